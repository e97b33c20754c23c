"""What every GPU benchmark shares: a report of rows, error norms, poisoned memory, and times by CUDA graph replay.

A benchmark is a module with `check(report)` and `time(report)`; `run(check, time)` is its command line:
`python -m benchmarks.gpu.linear --out FILE.json`, and with `--cpu` the same code on the CPU, where the kernels' places
are taken by their definitions in torch: a rehearsal, whose times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

ROTATE_BYTES = 256 << 20  # of distinct weights: more than any L2, which would otherwise be what is measured
REPLAYS = 20
Call = Callable[[], object]

# ||y - reference|| / ||reference|| with a float64 reference on the same weights: only the output is rounded
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}


class Report:
    """Rows of what was checked and what was timed, for a table and for a file."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.rows: list[dict] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def checked(self, name: str, value: float, limit: float, **case: object) -> None:
        """A figure that has to stay within a limit (0 for equality); NaN never does."""
        self.rows.append({"check": name, **case, "value": value, "limit": limit, "passes": value <= limit})
        if not value <= limit:
            print(f"FAILED {name}: {value:.3g} > {limit:.3g}  {case}", flush=True)

    def timed(self, name: str, seconds: float, **case: object) -> None:
        self.rows.append({"time": name, **case, "microseconds": seconds * 1e6})
        shown = "  ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in case.items()
        )
        print(f"{name:<22} {seconds * 1e6:10.2f} us  {shown}", flush=True)

    @property
    def failures(self) -> int:
        return sum(not row.get("passes", True) for row in self.rows)

    def document(self) -> dict:
        name = torch.cuda.get_device_name() if self.on_gpu else "cpu: a rehearsal"
        return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": self.rows}


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference||, in float64."""
    return float((y.double() - reference).norm() / reference.norm())


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements are not the same bits."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """An output full of NaN inside a buffer full of NaN: (buffer, output). What stays outside shows overruns."""
    count = 1
    for extent in shape:
        count *= extent
    guard = 1024  # elements on both sides
    buffer = torch.full((count + 2 * guard,), torch.nan, dtype=dtype, device=device)
    return buffer, buffer[guard : guard + count].view(shape)


def guards_hold(buffer: Tensor, output: Tensor) -> bool:
    guard = (buffer.numel() - output.numel()) // 2
    return bool(buffer[:guard].isnan().all() and buffer[guard + output.numel() :].isnan().all())


def seconds(calls: Iterable[Call], report: Report) -> float:
    """Median seconds of one call, all calls captured in one graph that is replayed; they rotate through weights.

    Called once before, so that everything is compiled, loaded and tuned.
    """
    calls = list(calls)
    for call in calls:
        call()
    if not report.on_gpu:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for replay in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives when its graph is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return y


def rotations(weight_bytes: int, report: Report) -> int:
    """Copies of a weight that make up `ROTATE_BYTES`; one for a rehearsal."""
    return max(1, -(-ROTATE_BYTES // weight_bytes)) if report.on_gpu else 1


def copy_bandwidth(report: Report) -> float:
    """Bytes read and written per second by a device-to-device copy: what "100 % of bandwidth" means."""
    source = torch.empty((1 << 30) if report.on_gpu else (1 << 20), dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds([lambda: target.copy_(source)], report)


def run(check: Callable[[Report], None], time_: Callable[[Report], None]) -> int:
    """The command line of a benchmark: exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, with definitions in place of kernels")
    parser.add_argument("--only", choices=["check", "time"])
    options = parser.parse_args()
    if not options.cpu:
        from compressor.kernels.cuda import available

        if reason := available():
            print(f"no kernels here: {reason}; --cpu rehearses", file=sys.stderr)
            return 3
    torch.manual_seed(0)
    report = Report("cpu" if options.cpu else "cuda")
    for name, part in (("check", check), ("time", time_)):
        if options.only in (None, name):
            part(report)
    if options.out:
        options.out.write_text(json.dumps(report.document(), indent=1) + "\n")
    checks = sum("check" in row for row in report.rows)
    print(json.dumps({"checks": checks, "failures": report.failures, "times": len(report.rows) - checks}))
    return 1 if report.failures else 0
