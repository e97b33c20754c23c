import pytest
import torch

from compressor.algorithms.losses import chunked_forward_kl, forward_kl


def test_forward_kl_is_the_definition():
    """Sum of p log(p / q) in float64."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(5, 11, generator=generator), torch.randn(5, 11, generator=generator)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(forward_kl(teacher, student).double(), expected, atol=1e-6)


def test_padded_vocabulary_is_ignored():
    """Extra columns of the student change nothing."""
    teacher = torch.randn(3, 7)
    assert torch.allclose(
        forward_kl(teacher, torch.cat([teacher, torch.full((3, 2), 50.0)], -1)), torch.zeros(3), atol=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    """The same number and the same gradient as all tokens at once."""
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(13, 6, generator=generator)
    teacher = torch.randn(10, 6, generator=generator)
    student = torch.randn(10, 6, generator=generator, requires_grad=True)
    whole = forward_kl(teacher @ head.T, student @ head.T, 2.0).mean()
    (expected,) = torch.autograd.grad(whole, student)
    loss = chunked_forward_kl(
        teacher, student, lambda h: h @ head.T, lambda h: h @ head.T, temperature=2.0, chunk=chunk
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(loss, whole, atol=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-6)
