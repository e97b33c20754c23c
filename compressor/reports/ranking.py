"""Which of several models lose least, and which of them cannot be told apart, from losses on the same windows.

V models, N windows, S seeds, R resamples. A loss is in nats a token (KL to the baseline), lower is better.

Two models are told apart when their difference is larger than chance gives among ALL pairs of the comparison: windows
are resampled together for all models that were measured on the same ones, and the critical value is the 95 % quantile
of the largest standardised difference (Westfall and Young, 1993). Judged a pair at a time, thirteen equal models make
78 pairs, and some pair would look different in most comparisons. The spread between seeds adds to the error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from compressor.reports.estimate import Estimate

RESAMPLES = 2000
CONFIDENCE = 0.95
ROUNDING = 1e-9  # differences below this share of the losses are the order of a sum, not a difference

Window = tuple[str, int, str]  # text, number, digest of the text's windows


@dataclass(frozen=True)
class WindowLosses:
    """The losses of one model by window, the mean over its seeds, and each seed's mean; no windows: not measured."""

    name: str
    windows: tuple[Window, ...]
    losses_N: tuple[float, ...]
    tokens_N: tuple[int, ...]
    seed_means: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over tokens; not finite for a model that is broken or was not measured."""
        if not self.windows:
            return math.nan
        return float(np.dot(self.losses_N, self.tokens_N) / np.sum(self.tokens_N))


@dataclass(frozen=True)
class Place:
    """Where a model stands: `group` counts from 1, and its members cannot be told apart from the group's first.

    `alike` names all models from which it cannot be told apart. A loss that is not finite has no group.
    """

    name: str
    loss: float
    group: int | None
    alike: tuple[str, ...]


def rank(models: Sequence[WindowLosses]) -> list[Place]:
    """All models by their mean loss, lowest first; those without a finite loss come last."""
    apart = told_apart(models)
    order = sorted(range(len(models)), key=lambda v: (not math.isfinite(models[v].mean), models[v].mean))
    places: list[Place] = []
    group, first = 0, -1
    for v in order:
        if not math.isfinite(models[v].mean):
            places.append(Place(models[v].name, models[v].mean, None, ()))
            continue
        if first < 0 or apart[first, v]:
            group, first = group + 1, v
        alike = tuple(models[w].name for w in order if w != v and not apart[v, w])
        places.append(Place(models[v].name, models[v].mean, group, alike))
    return places


def told_apart(models: Sequence[WindowLosses], *, seed: int = 0) -> NDArray[np.bool_]:
    """For each pair of models whether their losses differ, `[V, V]`, right for all pairs at once in 95 % of cases.

    Models measured on the same windows are compared window by window, others as independent samples. A single window
    tells nothing apart; a loss that is not finite differs from every finite one.
    """
    means_V = np.array([model.mean for model in models])
    finite_V = np.isfinite(means_V)
    usable = [v for v in range(len(models)) if finite_V[v]]
    apart_VV = finite_V[:, None] != finite_V[None, :]
    if len(usable) < 2:
        return apart_VV
    resampled_RV = _resampled_means([models[v] for v in usable], seed)
    centred_RV = resampled_RV - means_V[usable]
    rows, columns = np.triu_indices(len(usable), 1)
    noise_RP = centred_RV[:, rows] - centred_RV[:, columns]
    gap_P = np.abs(means_V[usable][rows] - means_V[usable][columns])
    smallest = ROUNDING * float(np.abs(means_V[usable]).max())
    counts_V = np.array([len(models[v].windows) for v in usable])
    fewest_P = np.minimum(counts_V[rows], counts_V[columns])
    error_P = noise_RP.std(0) * np.sqrt(fewest_P / np.maximum(1, fewest_P - 1))
    error_P[error_P <= smallest] = 0.0
    varied = error_P > 0
    largest_R = (np.abs(noise_RP[:, varied]) / error_P[varied]).max(1) if varied.any() else np.zeros(len(noise_RP))
    critical = float(np.quantile(largest_R, CONFIDENCE))
    for p, (i, j) in enumerate(zip(rows, columns, strict=True)):
        one, other = usable[i], usable[j]
        limit = _limit(critical, float(error_P[p]), int(fewest_P[p]), [models[one], models[other]])
        apart_VV[one, other] = apart_VV[other, one] = bool(gap_P[p] > max(limit, smallest))
    return apart_VV


def seed_interval(seed_means: Sequence[float]) -> Estimate | None:
    """The mean over seeds with a t interval (it tells what another seed would give); None for fewer than two seeds."""
    from scipy import stats

    if len(seed_means) < 2 or not all(map(math.isfinite, seed_means)):
        return None
    mean, count = float(np.mean(seed_means)), len(seed_means)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(seed_means, ddof=1) / math.sqrt(count))
    return Estimate(mean, (mean - half, mean + half), count)


def _resampled_means(models: Sequence[WindowLosses], seed: int) -> NDArray[np.float64]:
    """Means over resampled windows, `[R, V]`; models with the same windows are resampled together."""
    means_RV = np.empty((RESAMPLES, len(models)))
    sets = list(dict.fromkeys(model.windows for model in models))
    for number, windows in enumerate(sets):
        members = [v for v, model in enumerate(models) if model.windows == windows]
        count = len(windows)
        picks_RN = np.random.default_rng([seed, number]).integers(0, count, (RESAMPLES, count))
        cells = picks_RN + count * np.arange(RESAMPLES)[:, None]
        times_RN = np.bincount(cells.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count)
        for v in members:
            tokens_N = np.asarray(models[v].tokens_N, dtype=np.float64)
            totals_N = np.asarray(models[v].losses_N, dtype=np.float64) * tokens_N
            means_RV[:, v] = (times_RN @ totals_N) / (times_RN @ tokens_N)
    return means_RV


def _limit(critical: float, error: float, windows: int, pair: Sequence[WindowLosses]) -> float:
    """How large a difference has to be: `critical` of a normal, for as few windows and seeds as there are.

    Degrees of freedom of the sum of both errors after Welch and Satterthwaite.
    """
    from scipy import stats

    if windows < 2:
        return math.inf
    parts = [(error**2, windows - 1)]
    for model in pair:
        if len(model.seed_means) > 1:
            parts.append((float(np.var(model.seed_means, ddof=1)) / len(model.seed_means), len(model.seed_means) - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    tail = NormalDist().cdf(-max(critical, NormalDist().inv_cdf(0.975)))
    return float(stats.t.isf(tail, freedom)) * math.sqrt(variance)
