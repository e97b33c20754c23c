"""What nvcc makes of a kernel: registers, shared memory, spills, and the instructions themselves.

nvcc is on a developer's path or not: `needs_nvcc` skips with the reason in words. The disassembler is a wheel.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.kernels.cuda.build import CSRC, STANDARD, Kernel

ARCHS = ("sm_80", "sm_90a", "sm_100", "sm_120")
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the path")


@dataclass(frozen=True)
class Report:
    """Of one kernel on one architecture: bytes but for `registers` (a thread's), and its machine code as text."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    sass: str

    def count(self, pattern: str) -> int:
        """How many instructions begin with a pattern, such as r"HMMA\\.16816" or r"LDG\\.E\\.128"."""
        return len(re.findall(rf"(?m)^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?{pattern}", self.sass))


@functools.cache
def nvcc_report(kernel: Kernel, arch: str) -> Report:
    """Compile with nvcc's ptxas speaking, and disassemble."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(kernel.source)
        macros = [f"-D{name}={value}" for name, value in kernel.constants]
        command = [NVCC, "-cubin", f"-arch={arch}", f"-std={STANDARD}", "-Xptxas", "-v", f"-I{CSRC}", *macros]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sass = subprocess.run([_disassembler(), str(cubin)], capture_output=True, text=True, check=True).stdout
    lines = re.split(r"Compiling entry function '(\w+)'", done.stderr)
    log = lines[lines.index(kernel.name) + 1]
    body = re.split(
        r"(?m)^//-+ \.", sass[sass.index(f"//--------------------- .text.{kernel.name} ") + 2 :], maxsplit=1
    )[0]
    return Report(
        registers=_number(r"Used (\d+) registers", log),
        shared=_number(r"(\d+) bytes smem", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        sass=body,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _disassembler() -> str:
    """nvdisasm from the wheel `nvidia-cuda-nvdisasm`, else from the path."""
    import nvidia

    wheels = [Path(folder) / "cu13" / "bin" / "nvdisasm" for folder in nvidia.__path__]
    return next((str(path) for path in wheels if path.exists()), "nvdisasm")
