"""The training loop on a problem whose answer is known."""

import pytest
import torch
from torch import nn

from compressor.errors import CompressorError
from compressor.training import Schedule, fit


def problem(seed=0):
    """A linear layer, its batches, and a loss whose best weight is all ones."""
    torch.manual_seed(seed)
    module = nn.Linear(8, 4, bias=False)
    generator = torch.Generator().manual_seed(seed)

    def batches():
        while True:
            yield torch.randn(16, 8, generator=generator)

    return module, batches, lambda student, x: (student(x) - x.sum(-1, keepdim=True)).square().mean()


def test_the_loss_falls():
    """Below a hundredth of the first after 200 steps; one loss is kept for each step."""
    module, batches, loss = problem()
    fitted = fit(module, batches, loss, steps=200, schedule=Schedule(learning_rate=0.05))
    assert len(fitted.losses) == 200
    assert fitted.losses[-1] < 0.01 * fitted.losses[0]


def test_masked_weights_stay_exactly_zero():
    """Though the gradient pulls them to one."""
    module, batches, loss = problem()
    mask = torch.arange(32).reshape(4, 8) % 2 == 0
    module.weight.data *= mask
    fit(module, batches, loss, steps=50, schedule=Schedule(learning_rate=0.05), masks={"weight": mask})
    assert module.weight[~mask].count_nonzero() == 0
    assert module.weight[mask].count_nonzero() == 16


def test_weight_decay_and_momentum_do_not_move_masked_weights():
    """Also with decay, and after steps that gathered momentum."""
    module, batches, loss = problem()
    mask = torch.zeros(4, 8, dtype=torch.bool)
    module.weight.data *= mask
    fit(module, batches, loss, steps=5, schedule=Schedule(learning_rate=0.05, weight_decay=0.1), masks={"weight": mask})
    assert module.weight.count_nonzero() == 0


def test_the_same_seed_gives_the_same_bytes():
    """Two runs, one result."""
    weights = []
    for _ in range(2):
        module, batches, loss = problem(3)
        fit(module, batches, loss, steps=20, schedule=Schedule(learning_rate=0.05))
        weights.append(module.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_loss_that_is_not_finite_stops_with_its_step():
    """The third loss is NaN: the error says so, and the weights are those after two steps."""
    module, batches, loss = problem()
    seen, states = [], []

    def turning_bad(student, x):
        states.append(module.weight.detach().clone())
        seen.append(loss(student, x))
        return seen[-1] * (torch.nan if len(seen) == 3 else 1)

    with pytest.raises(CompressorError, match="distill: the loss of step 2 is nan"):
        fit(module, batches, turning_bad, steps=10, schedule=Schedule(learning_rate=0.05), label="distill")
    assert torch.equal(module.weight, states[-1])
    assert torch.isfinite(module.weight).all()


def test_the_module_is_left_in_evaluation_mode():
    """Without gradients, as everything else expects it, after an error too."""
    module, batches, _ = problem()
    with pytest.raises(ZeroDivisionError):
        fit(module, batches, lambda student, x: 1 / 0, steps=1, schedule=Schedule(learning_rate=0.05))
    assert not module.training
    assert not module.weight.requires_grad


def test_the_rate_warms_up_and_decays_to_a_tenth():
    """10 of 100 steps rise linearly to 1; then a cosine, half way at 0.55, towards 0.1."""
    schedule = Schedule(learning_rate=1.0)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[55] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1, abs=1e-3)


def test_gradients_are_clipped():
    """A loss a million times larger changes nothing but rounding: AdamW normalises, clipping keeps its history sane."""
    norms = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            norms.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))
            return super().step(closure)

    module, batches, loss = problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        fit(module, batches, lambda s, x: 1e6 * loss(s, x), steps=3, schedule=Schedule(learning_rate=0.01, clip=1.0))
    assert norms == pytest.approx([1.0] * 3, rel=1e-4)
