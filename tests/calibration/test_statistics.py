"""Statistics of inputs against their float64 definitions."""

import pytest
import torch

from compressor.calibration import Hessian, InputNorm

DTYPES = [torch.float32, torch.bfloat16]


def inputs(dtype, tokens=5000, width=48):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 2, width)  # activations have outlier channels
    return (torch.randn(tokens, width, generator=generator) * scale + scale / 3).to(dtype)


def relative(found, expected):
    """Largest error relative to the size of its row and column."""
    size = expected.diagonal().sqrt()
    return ((found.double() - expected).abs() / (size[:, None] * size)).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hessian_is_the_sum_of_outer_products(dtype):
    """X^T X in float64, within 1e-6 of each row and column's size; bfloat16 inputs lose nothing before the product."""
    x = inputs(dtype)
    hessian = Hessian(48)
    for part in x.split(1700):
        hessian.add(part)
    assert relative(hessian.value, x.double().T @ x.double()) < 1e-6
    assert hessian.tokens == 5000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_hessian_counts_each_token_with_its_weight(dtype):
    """X^T diag(w) X, within 1e-6."""
    x, weight = inputs(dtype), torch.rand(5000, generator=torch.Generator().manual_seed(1))
    hessian = Hessian(48)
    hessian.add(x, weight)
    assert relative(hessian.value, x.double().T @ (weight.double()[:, None] * x.double())) < 1e-6


def test_bfloat16_products_leave_the_setting_as_it_was():
    """Float32 matrix products elsewhere keep their precision."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    Hessian(48).add(inputs(torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_norm_is_the_euclidean_norm_of_each_column(dtype):
    """Over all batches together, within float32's rounding."""
    x = inputs(dtype)
    norm = InputNorm(48)
    for part in x.split(999):
        norm.add(part)
    assert torch.allclose(norm.value.double(), x.double().norm(dim=0), rtol=1e-6, atol=0)
