"""What can be timed on a machine that others use too: which clock, and how many threads.

On a crowded CPU two things are timed instead of the model. Waiting for a core: with two busy processes beside it on two
cores the log ratio of a turn had a standard deviation of 0.33 by the clock on the wall, 0.03 to 0.17 by the CPU time of
the process. And waiting for each other: torch's ops end in a barrier at which OpenMP threads spin; beside eight
processes a decoding step took 1,260 ms with two threads, 26 ms with one, and 30 ms with two under
OMP_WAIT_POLICY=PASSIVE, which has to be set before the process starts. So on a crowded machine one thread computes, and
its CPU time is what counts: what the model would take alone.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

Clock = Literal["wall", "cpu"]

CROWDED_SHARE = 0.10  # of the cores, used by others
LISTEN_S = 0.1
# On a crowded machine the user's threads stand only if they save at least a fifth of the time. Means, not the best of a
# few: a step with luck (6 ms) says nothing about those without (1,700 ms).
HELP = 0.8
STEPS = 4


@dataclass(frozen=True)
class Conditions:
    """How the timing is done; `crowded` says why it is not the wall clock and the user's threads."""

    clock: Clock
    threads: int
    others_share: float
    crowded: str | None = None


@contextlib.contextmanager
def quiet_conditions(step_ms: Callable[[], float], device: torch.device) -> Iterator[Conditions]:
    """Inside the block torch uses the threads that a timing may use now; gives them, and the clock that counts.

    `step_ms` runs a short piece of the work and returns its milliseconds by the wall clock; it is only called on a
    crowded machine.
    """
    threads, share = torch.get_num_threads(), others_share()
    conditions = Conditions("wall", threads, share)
    if device.type == "cpu" and share >= CROWDED_SHARE:
        conditions = _crowded(step_ms, threads, share)
    try:
        torch.set_num_threads(conditions.threads)
        yield conditions
    finally:
        torch.set_num_threads(threads)


def others_share() -> float:
    """The share of the cores that other processes use just now, while this one waits; 0 to 1."""
    return psutil.cpu_percent(LISTEN_S) / 100


def _crowded(step_ms: Callable[[], float], threads: int, share: float) -> Conditions:
    reason = f"other processes use {share:.0%} of the cores, so the CPU time of one thread counts"
    if threads == 1:
        return Conditions("cpu", 1, share, reason)
    step_ms()  # the first of its kind allocates and compiles
    together = statistics.fmean(step_ms() for _ in range(STEPS))
    torch.set_num_threads(1)
    try:
        alone = statistics.fmean(step_ms() for _ in range(STEPS))
    finally:
        torch.set_num_threads(threads)
    if together < HELP * alone:
        return Conditions("wall", threads, share)
    reason += f" (a step took {together:.1f} ms with {threads} threads, {alone:.1f} ms with one)"
    return Conditions("cpu", 1, share, reason)
