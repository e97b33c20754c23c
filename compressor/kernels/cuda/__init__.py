"""Our own CUDA kernels: why they are available here, or why not."""

import importlib.util

import torch

OLDEST = (8, 0)


def available() -> str | None:
    """None where the kernels can run; else the reason why they cannot, in words for `compress doctor`."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 (Ampere) or newer is needed"
    missing = [name for name in ("cuda.core", "cuda.bindings") if not _found(name)]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'compressor[cuda]'"
    return None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package `cuda` is missing
        return False
