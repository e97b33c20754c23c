"""Which clock counts and how many threads compute, by what others do and what threads are worth."""

import pytest
import torch

from compressor.metrics.latency import crowd
from compressor.metrics.latency.crowd import quiet_conditions

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """`machine(threads, share)`: torch set to so many threads, others use that share of the cores."""
    before = torch.get_num_threads()

    def is_set(threads: int, share: float) -> None:
        torch.set_num_threads(threads)
        monkeypatch.setattr(crowd, "others_share", lambda: share)

    yield is_set
    torch.set_num_threads(before)


def steps_by_threads(times: dict[int, float]):
    return lambda: times[torch.get_num_threads()]


def test_threads_that_wait_for_each_other_are_not_used(machine):
    """26 ms with one thread against 1,260 ms with two; the number is given back."""
    machine(2, 0.9)
    with quiet_conditions(steps_by_threads({1: 26.0, 2: 1260.0}), CPU) as conditions:
        assert torch.get_num_threads() == 1
    assert (conditions.clock, conditions.threads, conditions.others_share) == ("cpu", 1, 0.9)
    assert "use 90% of the cores" in conditions.crowded
    assert "1260.0 ms with 2 threads, 26.0 ms with one" in conditions.crowded
    assert torch.get_num_threads() == 2


def test_threads_that_help_little_are_not_used_on_a_crowded_machine(machine):
    """CPU time of two threads is no time that passes, and 10 % are not worth the noise of the wall clock."""
    machine(2, 0.5)
    with quiet_conditions(steps_by_threads({1: 20.0, 2: 18.0}), CPU) as conditions:
        assert (conditions.clock, torch.get_num_threads()) == ("cpu", 1)


def test_threads_that_help_stand(machine):
    """Many cores of which others use some."""
    machine(2, 0.5)
    with quiet_conditions(steps_by_threads({1: 20.0, 2: 11.0}), CPU) as conditions:
        assert (conditions.clock, torch.get_num_threads()) == ("wall", 2)
    assert conditions.crowded is None


def test_one_thread_needs_no_probe(machine):
    """Its CPU time counts as soon as others are there."""
    machine(1, 0.5)
    with quiet_conditions(steps_by_threads({}), CPU) as conditions:
        assert (conditions.clock, conditions.threads) == ("cpu", 1)


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.05), ("cuda", 0.9)])
def test_a_quiet_machine_is_timed_by_the_wall_without_a_probe(machine, device, share):
    """A GPU computes while the process waits, so its CPU time says nothing."""
    machine(2, share)
    with quiet_conditions(steps_by_threads({}), torch.device(device)) as conditions:
        assert (conditions.clock, torch.get_num_threads()) == ("wall", 2)


def test_threads_are_given_back_after_an_error(machine):
    """Also when the probe itself fails."""
    machine(2, 0.9)

    def fails():
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"), quiet_conditions(fails, CPU):
        pass
    assert torch.get_num_threads() == 2
