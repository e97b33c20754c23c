import pytest
import torch

from compressor.algorithms.gptq import NotPositiveDefinite, gptq, inverse_cholesky
from compressor.algorithms.rounding import fit_grid, round_to_nearest
from compressor.quant import QuantSpec

INT4 = QuantSpec(bits=4, group_size=64)


def correlated_problem(seed: int, outputs: int = 64, inputs: int = 256, tokens: int = 2048):
    """A weight and inputs whose columns share a low-rank part, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(tokens, 32, generator=generator) @ torch.randn(32, inputs, generator=generator) / 32**0.5
    x = x + 0.3 * torch.randn(tokens, inputs, generator=generator) @ mixing
    return weight, x


def output_error(weight, quantized, x):
    exact = x.double() @ weight.double().T
    return ((x.double() @ quantized.dequantize(torch.float64).T - exact).norm() / exact.norm()).item()


def test_inverse_cholesky_is_upper_and_inverts():
    """U^T U times the damped Hessian is the identity."""
    _, x = correlated_problem(0)
    hessian = (x.T @ x).double()
    upper = inverse_cholesky(hessian.float(), 0.01).double()
    damped = hessian + torch.eye(256) * 0.01 * hessian.diagonal().mean()
    assert torch.equal(upper, upper.triu())
    assert (upper.T @ upper @ damped - torch.eye(256)).abs().max() < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_equals_rounding_when_inputs_are_uncorrelated(symmetric):
    """With an identity Hessian there is no error to push anywhere."""
    weight, _ = correlated_problem(1)
    spec = QuantSpec(bits=4, group_size=64, symmetric=symmetric)
    assert torch.equal(gptq(weight, torch.eye(256), spec).codes, round_to_nearest(weight, spec).codes)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_much_less_than_rounding_on_correlated_inputs(seed, bits):
    """The output error is at most 0.8 of round-to-nearest's on the same grid."""
    weight, x = correlated_problem(seed)
    spec = QuantSpec(bits=bits, group_size=64)
    hessian = x.T @ x
    rounded = round_to_nearest(weight, spec, importance_I=hessian.diagonal())
    assert output_error(weight, gptq(weight, hessian, spec), x) < 0.8 * output_error(weight, rounded, x)


def test_gptq_is_the_textbook_recursion():
    """Codes equal those of a float64 loop over columns that updates all later columns at once."""
    weight, x = correlated_problem(3, outputs=16, inputs=192)
    hessian = (x.T @ x).float()
    result = gptq(weight, hessian, INT4)
    grid = fit_grid(weight, INT4, importance_I=hessian.diagonal(), dtype=torch.bfloat16)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double() + torch.eye(192) * 0.01 * hessian.double().diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work = weight.double()[:, order].clone()
    codes = torch.empty(16, 192)
    for j in range(192):
        scale = grid.scales[:, order[j] // 64].double()
        codes[:, order[j]] = (work[:, j] / scale).round().clamp(-8, 7).float()
        error = (work[:, j] - codes[:, order[j]].double() * scale) / upper[j, j]
        work[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    # float32 and float64 may part at a tie and drift apart in that row from there on
    assert (result.codes == codes).float().mean() > 0.995


def test_a_batch_of_experts_equals_one_expert_at_a_time():
    """Stacking changes no code."""
    problems = [correlated_problem(seed, outputs=32, inputs=128) for seed in (4, 5)]
    weights = torch.stack([w for w, _ in problems])
    hessians = torch.stack([x.T @ x for _, x in problems])
    together = gptq(weights, hessians, INT4)
    for e in range(2):
        alone = gptq(weights[e], hessians[e], INT4)
        assert torch.equal(together.codes[e], alone.codes)
        assert torch.equal(together.scales[e], alone.scales)


def test_inputs_that_never_occur_are_rounded_to_nearest():
    """A dead column gets no error pushed into it that matters, and no NaN comes out."""
    weight, x = correlated_problem(6)
    x[:, 10] = 0
    result = gptq(weight, x.T @ x, INT4)
    assert torch.isfinite(result.dequantize()).all()
    error = (result.dequantize()[:, 10] - weight[:, 10]).abs()
    assert (
        error
        <= result.scales[:, 0].float() * 0.51 + (weight[:, 10].abs() - 7 * result.scales[:, 0].float()).clamp(min=0)
    ).all()


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.full((64, 64), torch.nan)])
def test_useless_hessians_are_reported(hessian):
    """No statistics is an error for the caller to handle, not a silent result."""
    with pytest.raises(NotPositiveDefinite):
        gptq(torch.ones(8, 64), hessian, INT4)
