"""The loop that distillation and recovery share: one optimiser, one schedule, on accelerate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from compressor.calibration import Progress
from compressor.errors import CompressorError


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to a tenth."""

    learning_rate: float
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        """Learning rate of a step relative to the peak."""
        ramp = max(1, round(self.warmup * steps))
        if step < ramp:
            return (step + 1) / ramp
        progress = (step - ramp) / max(1, steps - ramp)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Fitted:
    """What a training run leaves beside the weights: the loss of each step."""

    losses: tuple[float, ...]


@torch.enable_grad()  # callers may well be inside torch.no_grad()
def fit(
    module: nn.Module,
    batches: Callable[[], Iterator[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    schedule: Schedule,
    masks: dict[str, Tensor] | None = None,
    label: str = "training",
    progress: Progress | None = None,
) -> Fitted:
    """Train all parameters of a module in place for `steps` batches.

    `masks` (True = keep) by parameter name: masked weights are zero after every step, so a pruned model stays pruned.
    Raises CompressorError at the first loss that is not finite, with its step; the weights before that step remain.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    module.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, steps))
    prepared, optimizer, rate = accelerator.prepare(module, optimizer, rate)
    masked = [(module.get_parameter(name), mask) for name, mask in (masks or {}).items()]
    losses: list[float] = []
    try:
        for step, batch in zip(range(steps), batches(), strict=False):
            value = loss(prepared, batch)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise CompressorError(f"{label}: the loss of step {step} is {losses[-1]}; use a smaller learning rate")
            accelerator.backward(value)
            accelerator.clip_grad_norm_(prepared.parameters(), schedule.clip)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, mask in masked:
                    parameter.mul_(mask)
            if progress is not None:
                progress(f"{label} (loss {losses[-1]:.4f})", step + 1, steps)
    finally:
        module.eval().requires_grad_(False)
        accelerator.free_memory()
    return Fitted(tuple(losses))
