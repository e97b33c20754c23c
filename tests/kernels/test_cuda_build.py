"""Compiling, keeping and launching kernels, without a GPU: NVRTC needs none, and the driver is a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.kernels import cuda
from compressor.kernels.cuda import build
from compressor.kernels.cuda.build import Kernel, cache_key, compile_kernel
from tests.kernels.host.simt import GXX, HOST, needs_gxx

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

KERNEL = Kernel("sum_splits.cuh", "sum_splits", (("BF16", 1), ("SPLITS", 2)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    build.cache_folder.cache_clear()
    yield tmp_path / "cache"
    build.cache_folder.cache_clear()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_nvrtc_compiles_for_every_architecture(arch):
    """An ELF file that holds the kernel under its plain name."""
    cubin = build.nvrtc_compile(KERNEL, arch)
    assert cubin.startswith(b"\x7fELF")
    assert b"sum_splits" in cubin


def test_a_kernel_is_compiled_once(cache, monkeypatch):
    """The second time it comes from the disk, byte for byte."""
    first = compile_kernel(KERNEL, "sm_80")
    monkeypatch.setattr(build, "nvrtc_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_kernel(KERNEL, "sm_80") == first
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + b"\0" + b[41:], lambda b: b""])
def test_a_damaged_cubin_is_not_loaded(cache, monkeypatch, damage):
    """Its hash does not hold, so it is compiled again and replaced."""
    monkeypatch.setattr(build, "nvrtc_compile", lambda *_: b"\x7fELF, as compiled")
    compile_kernel(KERNEL, "sm_80")
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(build, "nvrtc_compile", lambda *_: b"\x7fELF, as compiled again")
    assert compile_kernel(KERNEL, "sm_80") == b"\x7fELF, as compiled again"
    monkeypatch.setattr(build, "nvrtc_compile", lambda *_: pytest.fail("not replaced"))
    assert compile_kernel(KERNEL, "sm_80") == b"\x7fELF, as compiled again"


def test_the_key_holds_all_that_the_machine_code_depends_on():
    """Another constant, kernel, architecture, source or compiler is another file."""
    other = Kernel("sum_splits.cuh", "sum_splits", (("BF16", 0), ("SPLITS", 2)))
    renamed = Kernel("pack.cuh", "pack", KERNEL.constants)
    keys = {
        cache_key(KERNEL, "sm_80", "a", "13.0"),
        cache_key(other, "sm_80", "a", "13.0"),
        cache_key(renamed, "sm_80", "a", "13.0"),
        cache_key(KERNEL, "sm_86", "a", "13.0"),
        cache_key(KERNEL, "sm_80", "b", "13.0"),
        cache_key(KERNEL, "sm_80", "a", "13.1"),
    }
    assert len(keys) == 6


def test_a_folder_that_was_asked_for_has_to_be_writable(tmp_path, monkeypatch):
    """The error names the variable and its value."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "file" / "cache"))
    build.cache_folder.cache_clear()
    with pytest.raises(OSError, match=r"COMPRESSOR_CACHE=.*file/cache cannot be written"):
        build.cache_folder()


def test_a_home_that_cannot_be_written_is_left_alone(tmp_path, monkeypatch):
    """The process gets a folder of its own."""
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("COMPRESSOR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    build.cache_folder.cache_clear()
    assert build.cache_folder().parent == tmp_path
    assert build.cache_folder().stat().st_mode & 0o077 == 0
    build.cache_folder.cache_clear()


def test_a_constant_that_is_missing_is_named_by_the_compiler():
    """NVRTC's log is in the error."""
    with pytest.raises(Exception, match="BF16 is not defined"):
        build.nvrtc_compile(Kernel("sum_splits.cuh", "sum_splits", ()), "sm_80")


_LAUNCH = """
import torch
from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, Loaded, launch_on
device = Device(index=0, arch="sm_90a", sm_count=132, shared_per_block=232448, l2_bytes=1)
loaded = Loaded(Kernel("kernel.cuh", "kernel", ()), b"\\x7fELF...", device)
x = torch.zeros(4)
launch_on(0x77, loaded, (6, 2), 256, [x, 0, -5, 1.5], 100000, 2, True)
launch_on(0, loaded, 6, (32, 2), [x[1:], x, 7, -0.25], 0, 1, False)
print([x.data_ptr(), x.data_ptr() + 4])
launch_on(0, loaded, 6, 32, [x, x, 7, 0.25], 232448, 1, False)
"""


@needs_gxx
def test_the_driver_is_given_what_was_asked(tmp_path):
    """Grid, cluster, dependent launch, shared memory, stream and arguments, through the real bindings."""
    command = [GXX, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(HOST / "fake_driver.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "libcuda.so.1")], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(cuda.__file__).parents[3])}
    command = [sys.executable, "-c", _LAUNCH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    first, second = (line for line in lines if "grid" in line)
    x, shifted = next(line for line in lines if isinstance(line, list))
    limit = 232448 - 1000  # all that the device has, less what the kernel takes by itself
    assert first == {
        "grid": [6, 2, 1], "block": [256, 1, 1], "shared": 100000, "stream": 0x77, "cluster": 2, "programmatic": 1,
        "limit": limit, "args": [x, 0, -5, 1.5],
    }  # fmt: skip
    assert second == {
        "grid": [6, 1, 1], "block": [32, 2, 1], "shared": 0, "stream": 0, "cluster": 1, "programmatic": 0,
        "limit": limit, "args": [shifted, x, 7, -0.25],
    }  # fmt: skip
    assert "launching kernel on grid 6, block 32, 232448 bytes" in done.stderr
    assert "CUDA_ERROR_INVALID_VALUE" in done.stderr


def test_it_says_why_there_are_no_kernels(monkeypatch):
    """One reason after another, until there is none."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in cuda.available()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.available() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert cuda.available() == "Tesla T4 has compute capability 7.5; 8.0 (Ampere) or newer is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert cuda.available() is None
    monkeypatch.setattr(cuda, "_found", lambda name: name != "cuda.core")
    assert cuda.available() == "cuda.core not installed: pip install 'compressor[cuda]'"
