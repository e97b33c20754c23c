"""Distances between what two models predict.

M tokens, V vocabulary, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def forward_kl(teacher_logits_MV: Tensor, student_logits_MV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each token in nats, `[M]`, times the temperature squared (Hinton et al. 2015, 2).

    Vocabularies may differ by padding: the common first columns are compared.
    """
    width = min(teacher_logits_MV.shape[-1], student_logits_MV.shape[-1])
    teacher = torch.log_softmax(teacher_logits_MV[..., :width].float() / temperature, dim=-1)
    student = torch.log_softmax(student_logits_MV[..., :width].float() / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def chunked_forward_kl(
    teacher_hidden_MD: Tensor,
    student_hidden_MD: Tensor,
    teacher_logits: Callable[[Tensor], Tensor],
    student_logits: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """Mean forward KL over all tokens with at most `chunk` rows of logits in memory, in the backward pass as well.

    The two callables turn hidden states into logits; each chunk is recomputed when its gradient is asked for.
    """

    def one(teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher_logits(teacher_hidden)
        return forward_kl(target, student_logits(student_hidden), temperature).sum()

    total = student_hidden_MD.new_zeros((), dtype=torch.float32)
    for teacher_part, student_part in zip(teacher_hidden_MD.split(chunk), student_hidden_MD.split(chunk), strict=True):
        total = total + checkpoint(one, teacher_part, student_part, use_reentrant=False)
    return total / student_hidden_MD.shape[0]
