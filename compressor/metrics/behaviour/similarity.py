"""Sentence embeddings: do two sentences that people find alike still lie close to each other (STS-B)?

The score is Spearman's rank correlation between the cosine of two embeddings and what people said. N sentences or
pairs, B sentences in a batch, T tokens, D embedding width; R resamples.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from compressor.errors import IntegrityError, RecipeError, UnsupportedModel
from compressor.metrics.bootstrap import RESAMPLES, Values
from compressor.models.loading import load_tokenizer
from compressor.models.transformers_io import quiet
from compressor.reports.estimate import Estimate
from compressor.reports.items import SIMILARITY, TaskItem, pair_items

Pooling = Literal["mean", "cls", "max"]
POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip
COLUMNS = (("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("text1", "text2"))
GOLD = ("score", "similarity_score", "label", "gold")
UNUSED = "pooler."  # the head of BERT's pre-training, which checkpoints of embedding models often lack
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")  # a cosine does not see whether vectors are normalised


@dataclass(frozen=True)
class SentencePair:
    """Two sentences and how alike people found them; `item` is the place in the file, from 0."""

    item: int
    first: str
    second: str
    gold: float


@dataclass(frozen=True)
class SimilarityResult:
    """Spearman's correlation over the pairs, and the cosine of each pair."""

    spearman: Estimate
    items: tuple[TaskItem, ...]


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a folder's sentence-transformers files say that sentences become vectors."""

    pooling: Pooling = "mean"
    max_length: int | None = None
    lower: bool = False


def read_pairs(data: str | Path, items: int | None = None) -> list[SentencePair]:
    """The pairs of a .csv file (with or without a header) or a .jsonl file; `items` of them, evenly spaced.

    Without a header a row is sentence1, sentence2, score; otherwise columns are found by name. RecipeError names the
    file, the line and what is there instead.
    """
    path = Path(data).expanduser()
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"similarity: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"similarity: {path} is not readable as UTF-8 text: {error}") from None
    if path.suffix not in (".csv", ".jsonl"):
        raise RecipeError(f"similarity: {path} has to end in .csv or .jsonl")
    rows = _csv_rows(path, content) if path.suffix == ".csv" else _json_rows(path, content)
    pairs = [SentencePair(number, *_pair(where, row)) for number, (where, row) in enumerate(rows)]
    if len(pairs) < 3:
        raise RecipeError(f"similarity: {path} holds {len(pairs)} pairs; a rank correlation needs three")
    if items is None or items >= len(pairs):
        return pairs
    return [pairs[part * len(pairs) // items] for part in range(items)]


def embedding_settings(folder: Path | str) -> EmbeddingSettings:
    """Pooling, length and case as the folder's sentence-transformers files have them; plain mean where there are none.

    UnsupportedModel for a pooling or a further layer that is not understood.
    """
    folder = Path(folder)
    pooling = _pooling(folder)
    path = folder / "sentence_bert_config.json"
    settings = _json(path) if path.exists() else {}
    return EmbeddingSettings(pooling, settings.get("max_seq_length"), bool(settings.get("do_lower_case", False)))


@torch.inference_mode()
def embed(
    model: nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    batch_size: int = 32,
    *,
    settings: EmbeddingSettings | None = None,
) -> Tensor:
    """One vector for each sentence, `[N, D]` float32: the last hidden states, pooled over the sentence's own tokens.

    `model` is an encoder whose output has `last_hidden_state`. Sentences of like length share a batch.
    """
    settings = settings or EmbeddingSettings()
    texts = [text.lower() for text in sentences] if settings.lower else list(sentences)
    limit = settings.max_length or _longest(model)
    encoded = [tokenizer(text, truncation=limit is not None, max_length=limit) for text in texts]
    device = next(model.parameters()).device
    vectors: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda n: (len(encoded[n]["input_ids"]), n))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = {name: part.to(device) for name, part in _padded([encoded[n] for n in batch], tokenizer).items()}
        hidden_BTD = model(**inputs).last_hidden_state
        pooled_BD = _pooled(hidden_BTD.float(), inputs["attention_mask"], settings.pooling).cpu()
        vectors |= dict(zip(batch, pooled_BD, strict=True))
    return torch.stack([vectors[n] for n in range(len(texts))])


def measure_similarity(
    model: str | Path | nn.Module,
    data: str | Path | Sequence[SentencePair],
    *,
    tokenizer: Any = None,
    items: int | None = None,
    batch_size: int = 32,
    settings: EmbeddingSettings | None = None,
    task: str = "sts",
) -> SimilarityResult:
    """Spearman's correlation of an encoder's cosines with people's scores, with a bootstrap interval over pairs.

    `model` is a folder or a module (then with its `tokenizer`); `data` a file or pairs that were read. RecipeError for
    a module without a tokenizer or data that cannot be used.
    """
    pairs = read_pairs(data, items) if isinstance(data, str | Path) else list(data)
    if isinstance(model, str | Path):
        settings = settings or embedding_settings(model)
        tokenizer = tokenizer or load_tokenizer(Path(model))
        model = load_encoder(model)
    if tokenizer is None:
        raise RecipeError("similarity: a model in memory needs its tokenizer beside it")
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    vectors_ND = embed(model, tokenizer, sentences, batch_size, settings=settings).double()
    row = {text: number for number, text in enumerate(sentences)}
    first_ND = vectors_ND[[row[pair.first] for pair in pairs]]
    second_ND = vectors_ND[[row[pair.second] for pair in pairs]]
    cosine_N = cosine_similarity(first_ND, second_ND).tolist()
    records = tuple(_item(task, pair, cosine) for pair, cosine in zip(pairs, cosine_N, strict=True))
    return SimilarityResult(spearman(cosine_N, [pair.gold for pair in pairs]), records)


def load_encoder(folder: Path | str) -> nn.Module:
    """The encoder of a checkpoint folder, in float32, ready to embed.

    IntegrityError where the files lack weights that embeddings need: transformers would make them up.
    """
    from transformers import AutoModel

    if not (Path(folder) / "config.json").exists():
        raise UnsupportedModel(f"{folder} has no config.json: not a transformers checkpoint")
    with quiet():
        loaded: Any = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(UNUSED))
    if missing:
        raise IntegrityError(f"{folder} holds no {missing[0]} ({len(missing)} weights are missing)")
    return model.eval()


def spearman(scores_N: Values, gold_N: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Spearman's rank correlation with a 95 % interval from resampling pairs, ranks taken anew each time.

    ValueError for fewer than three pairs, values that are not finite, or a side whose values are all equal.
    """
    scores_N, gold_N = np.asarray(scores_N, dtype=np.float64), np.asarray(gold_N, dtype=np.float64)
    if scores_N.shape != gold_N.shape or scores_N.ndim != 1 or scores_N.size < 3:
        raise ValueError(f"three or more pairs are needed, got {scores_N.size} scores and {gold_N.size} answers")
    if not (np.isfinite(scores_N).all() and np.isfinite(gold_N).all()):
        raise ValueError("a rank correlation takes finite values only")
    value = float(_correlation(scores_N[None], gold_N[None])[0])
    if math.isnan(value):
        raise ValueError("all values of one side are equal: they have no ranks to correlate")
    picks_RN = _picks(scores_N.size, resamples, seed)
    return _estimate(value, _correlation(scores_N[picks_RN], gold_N[picks_RN]), scores_N.size)


def spearman_change(
    baseline: Sequence[TaskItem], candidate: Sequence[TaskItem], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Spearman's correlation of the candidate minus that of the baseline, on the same pairs, resampled together.

    The items are those of one `measure_similarity` each. IntegrityError where the two do not pair.
    """
    [pairs] = pair_items(baseline, candidate).values()
    before_N, after_N = (np.array([pair[side].score for pair in pairs]) for side in (0, 1))
    gold_N = np.array([float(pair[0].answer or "nan") for pair in pairs])
    picks_RN = _picks(len(pairs), resamples, seed)
    gold_RN = gold_N[picks_RN]
    change_R = _correlation(after_N[picks_RN], gold_RN) - _correlation(before_N[picks_RN], gold_RN)
    value = spearman(after_N, gold_N, resamples=1).value - spearman(before_N, gold_N, resamples=1).value
    return _estimate(value, change_R, len(pairs))


def _correlation(one_RN: NDArray[np.float64], other_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each row: Pearson's of the ranks; NaN where a side has one value only."""
    from scipy.stats import rankdata

    ranks = [rankdata(side_RN, axis=1) for side_RN in (one_RN, other_RN)]
    one_RN, other_RN = (side_RN - side_RN.mean(axis=1, keepdims=True) for side_RN in ranks)
    norm_R = np.sqrt((one_RN**2).sum(1) * (other_RN**2).sum(1))
    return np.asarray((one_RN * other_RN).sum(1) / np.where(norm_R > 0, norm_R, np.nan))


def _picks(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def _estimate(value: float, resampled_R: NDArray[np.float64], count: int) -> Estimate:
    low, high = np.nanquantile(resampled_R, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)), count)


def _item(task: str, pair: SentencePair, cosine: float) -> TaskItem:
    asked = json.dumps([pair.first, pair.second, pair.gold])
    return TaskItem(
        measures=SIMILARITY,
        task=task,
        item=pair.item,
        sha256=hashlib.sha256(asked.encode()).hexdigest(),
        score=cosine,
        prompt=f"{pair.first} / {pair.second}",
        prediction=f"{cosine:.4f}",
        answer=f"{pair.gold:g}",
    )


def _padded(encoded: Sequence[Any], tokenizer: Any) -> dict[str, Tensor]:
    """Tokens of several sentences, padded at the end; where there is no padding token, 0 stands in, masked out."""
    pad = {"input_ids": tokenizer.pad_token_id or 0}
    width = max(len(one["input_ids"]) for one in encoded)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded[0]]
    return {
        name: torch.tensor([list(one[name]) + [pad.get(name, 0)] * (width - len(one[name])) for one in encoded])
        for name in names
    }


def _pooled(hidden_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "cls":
        return hidden_BTD[:, 0]
    mask_BT1 = mask_BT.unsqueeze(-1)
    if pooling == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, -math.inf).amax(1)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)


def _pooling(folder: Path) -> Pooling:
    modules = folder / "modules.json"
    config = folder / "1_Pooling" / "config.json"
    kinds = [str(entry.get("type", "")).rpartition(".")[2] for entry in _json(modules)] if modules.exists() else []
    if unknown := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        raise UnsupportedModel(f"{modules}: {unknown[0]} is not understood; possible are {', '.join(KNOWN_MODULES)}")
    if not config.exists():
        return "mean"
    chosen = [key for key, value in _json(config).items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UnsupportedModel(
            f"{config} asks for {', '.join(chosen) or 'no pooling'}; possible is one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[chosen[0]]


def _longest(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path}: not valid JSON ({error})") from None


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""))
    header: list[str] | None = None
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if not row:
            continue
        if header is None:
            header = row if not _is_number(row[-1]) else ["sentence1", "sentence2", "score"]
            if header is row:
                continue
        if len(row) != len(header):
            raise RecipeError(f"similarity: {where} has {len(row)} columns, expected {', '.join(header)}")
        yield where, dict(zip(header, row, strict=True))


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"similarity: {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise RecipeError(f"similarity: {path}, line {number}: a pair is an object with keys")
        yield f"{path}, line {number}", row


def _pair(where: str, row: dict[str, Any]) -> tuple[str, str, float]:
    names = next((pair for pair in COLUMNS if all(name in row for name in pair)), None)
    gold = next((name for name in GOLD if name in row), None)
    if names is None or gold is None:
        raise RecipeError(
            f"similarity: {where} has {', '.join(map(str, row))}; a pair has sentence1, sentence2 and one of "
            f"{', '.join(GOLD)}"
        )
    if not _is_number(row[gold]):
        raise RecipeError(f"similarity: {where}: {gold} is {row[gold]!r}, which is no number")
    if empty := [name for name in names if not str(row[name]).strip()]:
        raise RecipeError(f"similarity: {where}: {empty[0]} is empty")
    return str(row[names[0]]), str(row[names[1]]), float(row[gold])


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
