"""What a pass is: frozen options and one method, `apply`."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compressor.calibration import Calibration, Progress, Workplace, calibration_windows
from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import Block, Model
from compressor.reports import Ledger, LedgerRow


@dataclass(frozen=True)
class Context:
    """All that a pass is given beside the model."""

    calibration: Calibration
    seed: int = 0
    memory_bytes: int | None = None
    workplace: Workplace | None = None  # None for live models: nothing is written, nothing can be resumed
    progress: Progress | None = None
    reference: Callable[[], Model] | None = None  # the model before any compression, loaded anew
    ids: Tensor | None = None  # calibration windows given as they are (training scripts)

    def windows(self, own: Calibration | None, tokenizer: Any) -> Tensor:
        """The pass's own calibration windows, or the recipe's."""
        return (
            self.ids
            if self.ids is not None and own is None
            else calibration_windows(own or self.calibration, tokenizer)
        )

    @property
    def folder(self) -> Path | None:
        return self.workplace.folder if self.workplace else None


class Pass(Protocol):
    """A step of a recipe: options are checked when it is made, `plan` refuses what cannot work before any long work."""

    @property
    def id(self) -> str | None:
        """A name of its own, for recipes with several passes of a kind."""

    def plan(self, model: Model) -> list[LedgerRow]:
        """What `apply` is going to do to each weight; UnsupportedModel or RecipeError if it cannot."""

    def preview(self, model: Model) -> None:
        """Give an empty skeleton the shapes that it will have after this pass."""

    def apply(self, model: Model, context: Context) -> Ledger:
        """Change the model in place and account for every weight."""


def check_dense(model: Model, word: str) -> None:
    """UnsupportedModel for a quantized model: changing packed weights would round them twice."""
    if model.is_quantized:
        raise UnsupportedModel(f"{word}: {model.name} is quantized already; put `quantize` after the other passes")


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """True if a site's full name, or its end, matches one of the glob patterns."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    """RecipeError for a pattern that matches nothing: a misspelt `ignore` must not quantize what it names."""
    for pattern in patterns:
        if not any(is_ignored(name, (pattern,)) for name in names):
            sample = ", ".join(names[:4])
            raise RecipeError(f"ignore: {pattern!r} matches no weight of this model; weights are {sample}, ...")


def weight_names(model: Model) -> list[str]:
    """Names that `ignore` patterns can match: sites, stacks of experts, embedding and head."""
    names = [model.family.embedding, model.family.head]
    for k in range(model.num_blocks):
        block = model.anatomy(k)
        names += [site.name for site in block.sites] + ([block.experts.name] if block.experts else [])
    return names


def kept_rows(block: Block, treated: set[str], otherwise: str = "ignored") -> list[LedgerRow]:
    """Rows for the parameters of a block that a pass does not touch, with the reason."""
    rows = []
    for name, parameter in block.module.named_parameters():
        full = f"{block.name}.{name}"
        if full.removesuffix(".weight") in treated or full in treated:
            continue
        stack, path = block.experts, name.rpartition(".")[0]
        if stack and path in (stack.router_path, stack.shared_gate_path):
            reason = "router" if path == stack.router_path else "gate of the shared expert"
        else:
            reason = "bias" if name.endswith("bias") else "norm" if parameter.dim() == 1 else otherwise
        rows.append(_kept(full, reason, parameter))
    return rows


def rest_rows(model: Model) -> list[LedgerRow]:
    """Rows for embedding, final norm and head, which passes over blocks leave alone."""
    reasons = {
        model.family.embedding: "embedding", model.family.norm: "norm", model.family.head: "output head",
    }  # fmt: skip
    return [
        _kept(name, reasons.get(name.rpartition(".")[0], "outside the blocks"), parameter)
        for name, parameter in model.rest().items()
    ]


def _kept(name: str, reason: str, parameter: Tensor) -> LedgerRow:
    bits = parameter.element_size() * 8
    return LedgerRow(name=name, action="kept", reason=reason, parameters=parameter.numel(), bits=bits)
