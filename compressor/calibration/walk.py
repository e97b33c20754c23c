"""Walk a model block by block: observe what reaches a block, let a pass change it, go on from what comes out.

N windows, T tokens in a window, D model width, M tokens, I input features.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.stream import BATCH_TOKENS, Progress, batches, release_memory, through_block
from compressor.checkpoint import Journal, write_safetensors
from compressor.errors import IntegrityError
from compressor.models import Block, Model, Routed, dequantized


@dataclass
class Visit:
    """One block of a walk, with the inputs that reach it through the blocks already changed.

    `inputs` `[N, T, D]` come out of the compressed prefix, `dense_inputs` out of the model before the pass (None
    unless the walk carries that stream as well).
    """

    model: Model
    block: Block
    inputs: Tensor
    dense_inputs: Tensor | None
    outputs: Tensor | None = None  # of the unchanged block on `inputs`, once observed
    note: dict[str, Any] = field(default_factory=dict)  # JSON that the pass wants to keep of this block

    @torch.no_grad()
    def observe(
        self,
        on_input: Callable[[str, Tensor], None],
        on_experts: Callable[[Routed], None] | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """Run the unchanged block once; `on_input(reads, x [M, I])` for each distinct input of its linear sites.

        `on_experts` sees inputs and routing of the experts.
        """
        handles = []
        for reads, sites in self.block.shared_inputs().items():

            def hook(_: Any, arguments: tuple[Tensor, ...], reads: str = reads) -> None:
                on_input(reads, arguments[0].reshape(-1, arguments[0].shape[-1]))

            handles.append(sites[0].module.register_forward_pre_hook(hook))
        try:
            self.outputs = through_block(
                self.model, self.block, self.inputs, batch_tokens=batch_tokens, observe=on_experts
            )
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def advance(self) -> tuple[Tensor, float | None]:
        """Outputs of the changed block, and how far they moved relative to the outputs; None if it was never observed.

        They take the place of the unchanged block's, batch by batch: a third copy of all activations is never held.
        """
        outputs = torch.empty_like(self.inputs) if self.outputs is None else self.outputs
        moved = total = 0.0
        with dequantized(self.block, self.model.dtype):
            for where, batch in batches(self.inputs):
                after = through_block(self.model, self.block, batch)
                if self.outputs is not None:
                    before = outputs[where].float()
                    moved += float((after.float() - before).square().sum(dtype=torch.float64))
                    total += float(before.square().sum(dtype=torch.float64))
                outputs[where] = after
        if self.outputs is None:
            return outputs, None
        return outputs, (moved / total) ** 0.5 if total else 0.0


@dataclass(frozen=True)
class Workplace:
    """Where a pass of a stored model leaves its blocks, and the journal that lets a killed run continue.

    `folder` is the new generation (`work/NN`); without a workplace (live models) nothing is written.
    """

    folder: Path
    journal: Journal
    step: int

    def done(self) -> list[dict[str, Any]]:
        return self.journal.entries("block", step=self.step)

    def streams_file(self, k: int) -> Path:
        return self.folder / f"streams-{k}.safetensors"


@torch.no_grad()
def walk_blocks(
    model: Model,
    ids_NT: Tensor,
    notes: dict[int, dict[str, Any]],
    *,
    workplace: Workplace | None = None,
    dense_stream: bool = False,
    label: str = "blocks",
    progress: Progress | None = None,
) -> Generator[Visit, None, None]:
    """Visit every block in order; the caller changes `visit.block` between two steps of the loop.

    After each visit the block's outputs are computed with its new weights (packed ones dequantized), the block and both
    streams are written (temporary file, fsync, rename) and a line goes into the journal: a killed run continues at the
    next block with the same bytes. `notes[k]` is what the pass leaves in `visit.note`, with the block's `change`;
    those of blocks done before come out of the journal.
    """
    done = workplace.done() if workplace else []
    start = len(done)
    notes.update({entry["block"]: entry["note"] for entry in done})
    if workplace and 0 < start < model.num_blocks:
        inputs, dense_inputs = _read_streams(workplace, start, dense_stream)
    else:
        inputs = model.embed(ids_NT)
        dense_inputs = inputs if dense_stream else None
    for k in range(start, model.num_blocks):
        if progress is not None:
            progress(label, k, model.num_blocks)
        with model.open_block(k) as block:
            if dense_inputs is not None:
                dense_outputs = through_block(model, block, dense_inputs)
            visit = Visit(model, block, inputs, dense_inputs)
            yield visit
            outputs, change = visit.advance()
            notes[k] = visit.note | {"change": change}
            inputs, dense_inputs = outputs, (dense_outputs if dense_inputs is not None else None)
            if workplace:
                model.save_block(visit.block, workplace.folder)
                _finish_block(workplace, k, inputs, dense_inputs, notes[k])
        del visit, outputs
        release_memory()
    if progress is not None:
        progress(label, model.num_blocks, model.num_blocks)
    if workplace:
        workplace.streams_file(model.num_blocks).unlink(missing_ok=True)


def _finish_block(workplace: Workplace, k: int, inputs: Tensor, dense_inputs: Tensor | None, note: Any) -> None:
    streams = {"compressed": inputs} | ({"dense": dense_inputs} if dense_inputs is not None else {})
    write_safetensors(workplace.streams_file(k + 1), streams, {})
    workplace.journal.append("block", step=workplace.step, block=k, note=note)
    workplace.streams_file(k).unlink(missing_ok=True)


def _read_streams(workplace: Workplace, start: int, dense_stream: bool) -> tuple[Tensor, Tensor | None]:
    from safetensors.torch import load_file

    path = workplace.streams_file(start)
    try:
        streams = load_file(path)
        return streams["compressed"].clone(), streams["dense"].clone() if dense_stream else None
    except Exception as error:
        raise IntegrityError(f"{path}: cannot continue from this file ({error}); run again with --fresh") from error
