"""The package `gguf`, an extra: container, metadata keys and tensor names come from there."""

import importlib.util

from compressor.errors import EnvironmentProblem


def require_gguf() -> None:
    """EnvironmentProblem, with what to install, where it is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentProblem("writing GGUF needs the extra `gguf`: pip install 'compressor[gguf]'")
