"""How a model behaves on text unlike the rest: does compression hurt more there, and is such text still recognised?

ID is in-distribution text, OOD text from elsewhere. N windows; T tokens in a window, V vocabulary; R resamples,
K different scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.metrics.behaviour.figures import Figures
from compressor.metrics.bootstrap import RESAMPLES, Values
from compressor.reports.estimate import Estimate

DETECTORS = ("nll", "max_softmax", "energy")


@dataclass(frozen=True)
class WindowScores:
    """What one model gives the windows of one text.

    `kl_N` is the mean KL from the baseline of each window (None for the baseline itself), `detectors` the scores of
    `detection_scores` by name.
    """

    kl_N: Values | None = None
    detectors: Mapping[str, Values] = field(default_factory=dict)


def detection_scores(logits_NTV: Tensor, targets_NT: Tensor) -> dict[str, Tensor]:
    """How foreign each window looks to the model, `[N]` by detector; higher is more foreign.

    Means over the tokens of: `nll` (of the target), `max_softmax` (minus the probability of the first choice) and
    `energy` (minus logsumexp of the logits).
    """
    logits_NTV = logits_NTV.float()
    energy_NT = -logits_NTV.logsumexp(-1)
    target_NT = logits_NTV.gather(-1, targets_NT.unsqueeze(-1)).squeeze(-1)
    top_NT = logits_NTV.amax(-1)
    by_token = {
        "nll": -energy_NT - target_NT,
        "max_softmax": -torch.exp(top_NT + energy_NT),
        "energy": energy_NT,
    }
    return {name: scores_NT.double().mean(1) for name, scores_NT in by_token.items()}


def kl_ratio(kl_ood_N: Values, kl_id_N: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean KL from the baseline on OOD text over that on ID text; the windows of each side are resampled.

    Far above 1 means that compression was fitted to the ID text. ValueError where the KL on ID text is not above 0:
    a model that does not differ from its baseline has no ratio.
    """
    ood_N, id_N = _scores(kl_ood_N), _scores(kl_id_N)
    if id_N.mean() <= 0:
        raise ValueError(f"the KL on the in-distribution text is {id_N.mean():g}: there is nothing to divide by")
    generator = np.random.default_rng(seed)
    ood_R = ood_N[generator.integers(0, ood_N.size, (resamples, ood_N.size))].mean(1)
    id_R = id_N[generator.integers(0, id_N.size, (resamples, id_N.size))].mean(1)
    ratio_R = ood_R / np.where(id_R > 0, id_R, np.nan)
    return _estimate(float(ood_N.mean() / id_N.mean()), ratio_R, (ood_N, id_N))


def auroc(scores_id: Values, scores_ood: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The chance that an OOD window scores higher than an ID one, ties counting half; both sides are resampled.

    1 is perfect detection, 0.5 none.
    """
    id_N, ood_N = _scores(scores_id), _scores(scores_ood)
    picks = _two_sided(id_N.size, ood_N.size, resamples, seed)
    return _estimate(_area(id_N, ood_N), _areas(id_N, ood_N, picks), (id_N, ood_N))


def auroc_change(
    before: tuple[Values, Values], after: tuple[Values, Values], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """AUROC of the candidate minus that of the baseline, on the same windows, which are resampled together.

    `before` and `after` are (ID scores, OOD scores). ValueError where the two do not have the same windows.
    """
    id_before, ood_before, id_after, ood_after = map(_scores, (*before, *after))
    if id_before.size != id_after.size or ood_before.size != ood_after.size:
        raise ValueError(
            f"the same windows are needed: {id_before.size} and {ood_before.size} before, "
            f"{id_after.size} and {ood_after.size} after"
        )
    picks = _two_sided(id_after.size, ood_after.size, resamples, seed)
    change_R = _areas(id_after, ood_after, picks) - _areas(id_before, ood_before, picks)
    value = _area(id_after, ood_after) - _area(id_before, ood_before)
    return _estimate(value, change_R, (id_after, ood_after))


def ood_figures(
    within: WindowScores,
    foreign: Mapping[str, WindowScores],
    *,
    baseline_within: WindowScores | None = None,
    baseline_foreign: Mapping[str, WindowScores] | None = None,
) -> Figures:
    """`{text: {kl_ratio, auroc {detector}, auroc_change {detector}}}` for each OOD text against the ID text.

    Without the baseline's scores (for the baseline itself) there is only `auroc`. ValueError where only one of the two
    is given.
    """
    if (baseline_within is None) != (baseline_foreign is None):
        raise ValueError("give the baseline's scores of the ID text and of the OOD texts, or neither")
    values: dict[str, dict[str, object]] = {}
    reasons = {}
    for text, scores in foreign.items():
        values[text] = {"auroc": _by_detector(within, scores)}
        if baseline_within is None or baseline_foreign is None:
            continue
        earlier = baseline_foreign[text]
        values[text]["auroc_change"] = {
            name: auroc_change(
                (baseline_within.detectors[name], earlier.detectors[name]), (within.detectors[name], ood_N)
            )
            for name, ood_N in scores.detectors.items()
        }
        ratio, why = _ratio(within, scores)
        values[text]["kl_ratio"] = ratio
        if why:
            reasons[f"{text}.kl_ratio"] = why
    return Figures(values, reasons)


def _by_detector(within: WindowScores, foreign: WindowScores) -> dict[str, Estimate]:
    return {name: auroc(within.detectors[name], ood_N) for name, ood_N in foreign.detectors.items()}


def _ratio(within: WindowScores, foreign: WindowScores) -> tuple[Estimate | None, str | None]:
    if within.kl_N is None or foreign.kl_N is None:
        return None, "there is no KL from a baseline"
    try:
        return kl_ratio(foreign.kl_N, within.kl_N), None
    except ValueError as error:
        return None, str(error)


def _scores(values: Values) -> NDArray[np.float64]:
    array_N = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array_N.ndim != 1 or array_N.size == 0 or not np.isfinite(array_N).all():
        raise ValueError(f"one finite score for each window is needed, got shape {array_N.shape}: {array_N}")
    return array_N


def _two_sided(
    count_id: int, count_ood: int, resamples: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each resample, how often each window of either side is in it."""
    generator = np.random.default_rng(seed)
    return [
        (
            np.bincount(generator.integers(0, count_id, count_id), minlength=count_id),
            np.bincount(generator.integers(0, count_ood, count_ood), minlength=count_ood),
        )
        for _ in range(resamples)
    ]


def _area(id_N: NDArray[np.float64], ood_N: NDArray[np.float64]) -> float:
    once = (np.ones(id_N.size, dtype=np.int64), np.ones(ood_N.size, dtype=np.int64))
    return float(_areas(id_N, ood_N, [once])[0])


def _areas(
    id_N: NDArray[np.float64], ood_N: NDArray[np.float64], picks: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> NDArray[np.float64]:
    """The AUROC of each resample: every OOD window counts the ID windows below it, and half of those equal to it."""
    levels_K, where = np.unique(np.concatenate([id_N, ood_N]), return_inverse=True)
    of_id, of_ood = where[: id_N.size], where[id_N.size :]
    areas = []
    for times_id, times_ood in picks:
        id_K = np.bincount(of_id, weights=times_id, minlength=levels_K.size)
        ood_K = np.bincount(of_ood, weights=times_ood, minlength=levels_K.size)
        below_K = np.cumsum(id_K) - id_K / 2
        areas.append(ood_K @ below_K / (id_N.size * ood_N.size))
    return np.array(areas)


def _estimate(value: float, resampled_R: NDArray[np.float64], sides: tuple[NDArray[np.float64], ...]) -> Estimate:
    """With the interval of the resamples that gave a number; None where a side has a single window."""
    total = sum(side.size for side in sides)
    if min(side.size for side in sides) == 1 or not np.isfinite(resampled_R).all():
        return Estimate(value, None, total)
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(value, (float(low), float(high)), total)
