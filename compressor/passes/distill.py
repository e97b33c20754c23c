"""Distill: the compressed model learns to predict what the model before compression predicts.

N windows, T tokens in a window, D model width, M tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compressor.algorithms.losses import chunked_forward_kl
from compressor.calibration import DEMO_TEXT, Calibration, calibration_windows, last_hidden
from compressor.errors import RecipeError
from compressor.layers import CANONICAL
from compressor.models import Model, in_float32
from compressor.passes.base import Context, check_dense
from compressor.reports import Ledger, LedgerRow
from compressor.training import Schedule, fit


class Distill(BaseModel):
    """Train all weights on the predictions of the model before compression; zeros of earlier pruning stay zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    data: str = Field(DEMO_TEXT, description="demo/text, a .txt or .jsonl file, or a folder of them")
    tokens: int = Field(200_000, ge=1, description="tokens trained on, in all; texts repeat if they hold fewer")
    loss: Literal["forward_kl"] = "forward_kl"
    temperature: float = Field(2.0, gt=0, description="above 1 the less likely tokens weigh more")
    learning_rate: float = Field(2e-4, gt=0)
    length: int = Field(256, ge=8, description="tokens in a window")
    batch_tokens: int = Field(512, ge=8, description="tokens in an optimiser step")

    def plan(self, model: Model) -> list[LedgerRow]:
        """Every weight is trained; refuses quantized models."""
        check_dense(model, "distill")
        rows = []
        for k in range(model.num_blocks):
            block = model.anatomy(k)
            rows += [_trained(f"{block.name}.{name}", p) for name, p in block.module.named_parameters()]
        return rows + [_trained(name, parameter) for name, parameter in model.rest().items()]

    def preview(self, model: Model) -> None:
        """No shape changes."""

    def apply(self, model: Model, context: Context) -> Ledger:
        """Train the whole model in memory, on accelerate, in float32; weights return to their dtype afterwards."""
        rows = self.plan(model)
        if context.reference is None:
            raise RecipeError("distill needs the model before compression: give `reference`")
        ids = self.windows(model.tokenizer)
        teacher = context.reference()
        targets = last_hidden(teacher, ids, progress=context.progress)
        head = teacher.head()
        del teacher
        steps = max(1, self.tokens // self.batch_tokens)
        torch.manual_seed(context.seed)
        with model.live(layout=CANONICAL) as module:
            masks = {name: p != 0 for name, p in module.named_parameters() if _site_of(name) in model.state.pruned}
            with in_float32(module):
                fitted = fit(
                    module,
                    lambda: self._batches(ids, targets, context.seed),
                    lambda student, batch: self._loss(student, module, batch, head.logits),
                    steps=steps,
                    schedule=Schedule(learning_rate=self.learning_rate),
                    masks=masks,
                    label="distill",
                    progress=context.progress,
                )
            if context.folder is not None:
                for k in range(model.num_blocks):
                    model.save_block(model.anatomy(k), context.folder)
                model.save_rest(context.folder)
        summary = {"loss": [round(value, 5) for value in fitted.losses], "tokens": steps * self.batch_tokens}
        return Ledger(weights=tuple(rows), blocks=({"training": summary},))

    def windows(self, tokenizer: Any) -> Tensor:
        """The distinct windows to train on, `[N, T]`: as many as the tokens need, or as many as there are."""
        wanted = -(-self.tokens // self.length)
        while True:
            try:
                return calibration_windows(Calibration(data=self.data, samples=wanted, length=self.length), tokenizer)
            except RecipeError:
                if wanted <= max(1, self.batch_tokens // self.length):
                    raise
                wanted = wanted * 3 // 4  # the text is shorter than asked: it repeats, reshuffled

    def _batches(self, ids_NT: Tensor, targets_NTD: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of windows with the teacher's hidden states, in an order of its own each time round."""
        generator = torch.Generator().manual_seed(seed)
        size = max(1, self.batch_tokens // self.length)
        while True:
            for rows in torch.randperm(len(ids_NT), generator=generator).split(size):
                if len(rows) == size or len(ids_NT) < size:
                    yield ids_NT[rows], targets_NTD[rows]

    def _loss(self, student: nn.Module, module: Any, batch: tuple[Tensor, Tensor], teacher_logits: Any) -> Tensor:
        ids, targets = batch
        hidden = module.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        projection = module.get_output_embeddings()
        return chunked_forward_kl(
            targets.flatten(0, 1), hidden.flatten(0, 1), teacher_logits, projection, temperature=self.temperature
        )


def _cast(dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    """Parameters to these dtypes, in place; buffers stay (rotary frequencies in bfloat16 would be wrong for good)."""
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)


def _trained(name: str, parameter: Tensor) -> LedgerRow:
    bits = parameter.element_size() * 8
    return LedgerRow(name=name, action="trained", reason="", parameters=parameter.numel(), bits=bits)


def _site_of(parameter: str) -> str:
    return parameter.removesuffix(".weight")
