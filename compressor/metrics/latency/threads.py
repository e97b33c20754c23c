"""How many threads a timing may use: on a crowded machine threads that wait for each other are all that is timed.

torch's CPU ops end in a barrier at which OpenMP threads spin. With two threads on two cores and eight other processes a
decoding step of a small model took 1,260 ms, with one thread 26 ms, and with OMP_WAIT_POLICY=PASSIVE (which has to be
set before the process starts) 30 ms: the figure said nothing about the model.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator

import psutil
import torch

# Only then is one thread tried at all: on an idle machine with many cores it would take long and win nothing.
CROWDED_SHARE = 0.10  # of the cores, used by others
LISTEN_S = 0.1
# The user's number of threads stands unless one thread is faster by this factor. Means, not the best of a few: threads
# wait for each other now and then, and a step that had luck (6 ms) says nothing about those that had not (1,700 ms).
CONVOY = 1.25
STEPS = 4


@contextlib.contextmanager
def useful_threads(step_ms: Callable[[], float], device: torch.device, share: float) -> Iterator[str | None]:
    """Use one thread inside the block if the machine is so crowded that more threads only wait for each other.

    Yields the reason then, else None. `step_ms` runs a short piece of the work and returns its milliseconds; `share` is
    what other processes use of the cores (`others_share`).
    """
    threads = torch.get_num_threads()
    is_crowded = device.type == "cpu" and threads > 1 and share >= CROWDED_SHARE
    reason = _why_one(step_ms, threads, share) if is_crowded else None
    if reason is not None:
        torch.set_num_threads(1)
    try:
        yield reason
    finally:
        torch.set_num_threads(threads)


def others_share() -> float:
    """The share of the cores that other processes use just now, while this one waits; 0 to 1."""
    return psutil.cpu_percent(LISTEN_S) / 100


def _why_one(step_ms: Callable[[], float], threads: int, share: float) -> str | None:
    step_ms()  # the first of its kind allocates and compiles
    together = statistics.fmean(step_ms() for _ in range(STEPS))
    torch.set_num_threads(1)
    alone = statistics.fmean(step_ms() for _ in range(STEPS))
    torch.set_num_threads(threads)
    if together < CONVOY * alone:
        return None
    return (
        f"other processes use {share:.0%} of the cores: with {threads} threads a step took {together:.1f} ms, "
        f"with one {alone:.1f} ms (OMP_WAIT_POLICY=PASSIVE in the environment avoids this)"
    )
