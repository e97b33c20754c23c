"""Healthy exports of tiny models, as a run writes them, for the tests of structural rules and of planted faults."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor.calibration import Calibration, Workplace
from compressor.checkpoint import Journal
from compressor.exporters import export_safetensors
from compressor.models import load_model
from compressor.passes import Context
from tests.tiny_models import save_tiny, tiny_ids, tiny_model


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more, and beside other processes their threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_source(folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """A tiny checkpoint with norms that are not ones and a chat template."""
    model = tiny_model(family, dtype=dtype, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = (1 + 0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    save_tiny(folder, family, model=model)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return folder


def export(source: Path, passes: Sequence[Any], out: Path, *, shard_bytes: int = 10**9) -> tuple[Path, list[dict]]:
    """The model folder after these passes, and the ledger of each."""
    model, ledgers = load_model(str(source)), []
    for i, step in enumerate(passes):
        place = out / f"{i:02d}"
        place.mkdir(parents=True)
        context = Context(
            Calibration(),
            workplace=Workplace(place, Journal(out / f"{i:02d}.jsonl", {"test": 1}), i),
            reference=lambda: load_model(str(source)),
            ids=tiny_ids(16, 64),
        )
        ledgers.append(step.apply(model, context).to_json())
        model.finish_generation(place)
    export_safetensors(model, out / "model", shard_bytes=shard_bytes)
    return out / "model", ledgers
