"""Run a CUDA kernel on the host from its own source, compiled by g++ against simt.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from torch import Tensor

from compressor.kernels.cuda.build import CSRC, STANDARD, Kernel

GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++ is not on the path")
HOST = Path(__file__).parent

_GLUE = """#include "{header}"
extern "C" void run(const unsigned* grid, const unsigned* block, unsigned shared, int cluster, void** args) {{
    simt::launch({{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, shared, cluster,
                 [&] {{ simt::call({name}, args); }});
}}
"""


def run_on_host(kernel: Kernel, grid, block, args, *, shared: int = 0, cluster: int = 1) -> None:
    """What `launch` does on a GPU, with CPU tensors. Slow: for a few blocks of small shapes."""
    run = library(_GLUE.format(header=kernel.header, name=kernel.name), kernel.constants).run
    storage = (ctypes.c_uint64 * len(args))(*map(_bits, args))
    pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(storage) + 8 * i for i in range(len(args))))
    run(_three(grid), _three(block), shared, cluster, pointers)


@functools.cache
def library(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """A shared library of a source that may include our headers."""
    assert GXX is not None
    with tempfile.TemporaryDirectory(prefix="compressor-host-") as name:
        path, built = Path(name, "source.cpp"), Path(name, "library.so")
        path.write_text(source)
        macros = [f"-D{key}={value}" for key, value in constants]
        command = [GXX, f"-std={STANDARD}", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HOST}"]
        done = subprocess.run([*command, *macros, str(path), "-o", str(built)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(built))


def _bits(argument) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return ctypes.c_uint32.from_buffer(ctypes.c_float(argument)).value
    return argument & 0xFFFFFFFF


def _three(extent):
    extent = (extent,) if isinstance(extent, int) else extent
    return (ctypes.c_uint32 * 3)(*extent, *(1,) * (3 - len(extent)))
