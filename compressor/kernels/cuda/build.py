"""From a CUDA header and its constants to machine code for one GPU, by NVRTC, kept on disk.

Compiling needs no GPU and no CUDA toolkit: NVRTC comes with every CUDA build of torch, or as a wheel of its own. The
headers in `csrc/` include nothing but each other. What a kernel is specialised for (K, N, the group size, the dtype)
are constants, `-DNAME=VALUE`, so that one header serves all shapes and the compiler unrolls what it can see.
"""

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
STANDARD = "c++17"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Kernel:
    """One `extern "C" __global__` function of a header, with the macros that specialise it."""

    header: str
    name: str
    constants: tuple[tuple[str, int], ...]

    @property
    def source(self) -> str:
        return f'#include "{self.header}"\n'


def compile_kernel(kernel: Kernel, arch: str) -> bytes:
    """The cubin of a kernel for `arch` ("sm_80", "sm_90a" ...): from the disk cache, else compiled and put there."""
    path = cache_folder() / f"{cache_key(kernel, arch, sources_digest(), nvrtc_version())}.cubin"
    return _read(path) or _write(path, nvrtc_compile(kernel, arch))


def nvrtc_compile(kernel: Kernel, arch: str) -> bytes:
    """Compile without the cache. NVRTC's log is in the error that a wrong source raises."""
    from cuda.core import Program, ProgramOptions  # half a second to import: only where something is compiled

    options = ProgramOptions(
        name=f"{kernel.name}.cu",  # not the name of a header, which it would then seem to be
        arch=arch,
        std=STANDARD,
        include_path=str(CSRC),
        define_macro=[(name, str(value)) for name, value in kernel.constants] or None,
    )
    return bytes(Program(kernel.source, "c++", options).compile("cubin").code)


@functools.cache
def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC does not tell its version: {error}")
    return f"{major}.{minor}"


@functools.cache
def sources_digest() -> str:
    """One hash over all headers, since any may include any other."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.glob("*.cuh")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(kernel: Kernel, arch: str, sources: str, version: str) -> str:
    """What the machine code depends on, hashed: everything but the contents of the cache itself."""
    parts = [kernel.header, kernel.name, kernel.constants, arch, STANDARD, sources, version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def cache_folder() -> Path:
    """`$COMPRESSOR_CACHE`, else `~/.cache/compressor`; where the home cannot be written, a folder of this process."""
    asked = os.environ.get("COMPRESSOR_CACHE")
    folder = Path(asked) if asked else Path.home() / ".cache" / "compressor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if asked:
            raise OSError(f"COMPRESSOR_CACHE={asked} cannot be written: {error.strerror}") from error
        # Not a name that others could guess and fill: what lies there is loaded as code.
        return Path(tempfile.mkdtemp(prefix="compressor-"))
    return folder


def _read(path: Path) -> bytes | None:
    """The cubin behind its own hash; None where there is none or where it is damaged, which compiles it again."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, cubin = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> bytes:
    """By one rename: a reader sees all of it or nothing, whoever else compiles the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(hashlib.sha256(cubin).digest() + cubin)
    os.replace(file.name, path)
    return cubin
