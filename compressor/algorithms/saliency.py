"""Scores that say which weights or experts matter; higher is kept.

O output features, I input features, T tokens, E experts.
"""

from torch import Tensor


def magnitude(weight_OI: Tensor) -> Tensor:
    """The weight's size alone (the baseline that every other score must beat)."""
    return weight_OI.float().abs()


def wanda(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """Weight size times the norm of its input over the calibration tokens (Sun et al. 2023, arXiv 2306.11695)."""
    return weight_OI.float().abs() * input_norm_I


def reap(weighted_norms_E: Tensor, tokens_E: Tensor) -> Tensor:
    """Mean size of what an expert adds to the layer's output, over the tokens routed to it.

    `weighted_norms_E` is the sum over routed tokens of `gate * ||f_e(x)||`, with the gates as the model applies them
    (after top-k renormalisation), `tokens_E` the number of those tokens; an expert that no token reached scores 0.
    Source: Lasby et al. 2025, arXiv 2510.13999, equation 9.
    """
    return weighted_norms_E / tokens_E.clamp(min=1)
