"""Text to windows of tokens.

N windows, T tokens in a window.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compressor.errors import RecipeError
from compressor.models import demo_texts

DEMO_TEXT = "demo/text"


class Calibration(BaseModel):
    """Which text a pass looks at: `samples` windows of `length` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(DEMO_TEXT, description="demo/text, a .txt or .jsonl file, or a folder of them")
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=8)


def load_texts(data: str | dict[str, str], split: str = "calibration") -> dict[str, str]:
    """Texts by name: the bundled domains (`demo/text`), a file, each file of a folder, or a mapping name -> file.

    `.jsonl` lines are joined by blank lines; their key is `text` (or `prompt` and `response`). RecipeError names the
    file.
    """
    if isinstance(data, dict):
        return {name: _read(Path(path).expanduser()) for name, path in data.items()}
    if data == DEMO_TEXT:
        return {name: _read(path) for name, path in demo_texts(split).items()}
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise RecipeError(f"{path}: no .txt or .jsonl file in this folder")
        return {file.stem: _read(file) for file in files}
    return {path.stem: _read(path)}


def windows(text: str, tokenizer: Any, length: int, count: int | None = None) -> Tensor:
    """Consecutive windows of a text without overlap or padding, `[N, length]`; all of them, or the first `count`."""
    # Only so much text is tokenized as can be needed: a token is rarely longer than 16 characters
    part = text if count is None else text[: count * length * 16]
    ids = torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    whole = len(ids) // length
    taken = whole if count is None else min(count, whole)
    return ids[: taken * length].reshape(taken, length)


def calibration_windows(calibration: Calibration, tokenizer: Any) -> Tensor:
    """The windows of a calibration set, `[samples, length]`, taken from its texts in turn.

    RecipeError if the texts hold fewer; the error says how many there are.
    """
    texts = load_texts(calibration.data, "calibration")
    per_text = -(-calibration.samples // len(texts))
    parts = [windows(text, tokenizer, calibration.length, per_text) for text in texts.values()]
    # Taken in turn, so that fewer samples still mix all texts; a text that runs out leaves its turns to the others
    if sum(map(len, parts)) < calibration.samples:
        parts = [windows(text, tokenizer, calibration.length, calibration.samples) for text in texts.values()]
    mixed = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    if len(mixed) < calibration.samples:
        raise RecipeError(
            f"calibration: {calibration.data} holds {len(mixed)} windows of {calibration.length} tokens, "
            f"{calibration.samples} were asked for; ask for fewer or shorter samples, or give more text"
        )
    return torch.stack(mixed[: calibration.samples])


def _read(path: Path) -> str:
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no text at {path}; possible are {DEMO_TEXT}, a .txt or .jsonl file, a folder"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as UTF-8 text: {error}") from None
    return raw if path.suffix != ".jsonl" else "\n\n".join(_line_text(path, raw))


def _line_text(path: Path, raw: str) -> list[str]:
    texts = []
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}, line {number}: not JSON: {error}") from None
        if isinstance(record, dict) and "text" in record:
            texts.append(record["text"])
        elif isinstance(record, dict) and "prompt" in record and "response" in record:
            texts.append(record["prompt"] + record["response"])
        else:
            raise RecipeError(f"{path}, line {number}: no key 'text' (or 'prompt' and 'response')")
    return texts
