"""How a model behaves beside being right: robustness, foreign text, bias, generation, refusals, embeddings.

Everything here takes arrays, texts or functions, and knows neither a recipe nor a way to run a model (`similarity`
excepted, which embeds sentences). Figures are `Figures`: nested mappings for the behaviour section of a report, with
the reason for each that is None.
"""

from compressor.metrics.behaviour.bias import (
    preference,
    preference_shift,
    read_templates,
    score_swaps,
    swaps,
    template_bias,
)
from compressor.metrics.behaviour.figures import Figures, joined
from compressor.metrics.behaviour.generation import generation_change, generation_health
from compressor.metrics.behaviour.intervals import rate, rate_change
from compressor.metrics.behaviour.ood import (
    WindowScores,
    auroc,
    auroc_change,
    detection_scores,
    kl_ratio,
    ood_figures,
)
from compressor.metrics.behaviour.perturbations import VARIANTS
from compressor.metrics.behaviour.refusals import (
    is_refusal,
    read_refusal_prompts,
    refusal_figures,
    refusal_items,
    refusal_opening,
)
from compressor.metrics.behaviour.robustness import robustness_drop, robustness_gap, robustness_gaps
from compressor.metrics.behaviour.similarity import embed, measure_similarity, read_pairs, spearman, spearman_change

__all__ = [
    "VARIANTS",
    "Figures",
    "WindowScores",
    "auroc",
    "auroc_change",
    "detection_scores",
    "embed",
    "generation_change",
    "generation_health",
    "is_refusal",
    "joined",
    "kl_ratio",
    "measure_similarity",
    "ood_figures",
    "preference",
    "preference_shift",
    "rate",
    "rate_change",
    "read_pairs",
    "read_refusal_prompts",
    "read_templates",
    "refusal_figures",
    "refusal_items",
    "refusal_opening",
    "robustness_drop",
    "robustness_gap",
    "robustness_gaps",
    "score_swaps",
    "spearman",
    "spearman_change",
    "swaps",
    "template_bias",
]
