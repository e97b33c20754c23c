"""A GGUF file as a source: dequantized once into a folder of safetensors, which everything else reads."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from compressor.checkpoint import ShardWriter, file_sha256
from compressor.errors import EnvironmentProblem, IntegrityError, UnsupportedModel
from compressor.models.families import family_of
from compressor.models.transformers_io import build_skeleton, quiet

CONVERSION = 1  # part of the cache key: raise it when the conversion changes


def cache_folder() -> Path:
    """`$COMPRESSOR_CACHE`, or `compressor` in the user's cache."""
    root = os.environ.get("COMPRESSOR_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "compressor"


def dense_folder(path: Path) -> Path:
    """The dequantized checkpoint (bfloat16) of a GGUF file, made on first use and kept by the file's hash.

    UnsupportedModel for a Mixtral, whose experts transformers passes over in silence.
    """
    try:
        import gguf  # noqa: F401  (transformers' reader needs it)
    except ImportError:
        raise EnvironmentProblem(f"reading {path} needs the extra `gguf`: pip install 'compressor[gguf]'") from None
    folder = cache_folder() / f"gguf-{file_sha256(path)[:16]}-v{CONVERSION}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gguf-"))
        try:
            _convert(path, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _convert(path: Path, out: Path) -> None:
    import gguf
    from transformers import AutoConfig, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with quiet():
        try:
            if "llama.expert_count" in gguf.GGUFReader(path).fields:
                raise UnsupportedModel(f"{path}: transformers reads no Mixtral from GGUF; give its safetensors folder")
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            skeleton = build_skeleton(config, torch.bfloat16, family_of(config.model_type, str(path)))
            loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=skeleton, torch_dtype=torch.bfloat16)
        except (ValueError, KeyError, OSError) as error:
            raise IntegrityError(f"{path}: not readable as GGUF: {error}") from error
        tokenizer.save_pretrained(out)
    with ShardWriter(out, shard_bytes=5_000_000_000) as writer:
        for name in sorted(loaded["tensors"]):
            writer.add(name, loaded["tensors"].pop(name))
    config.dtype = torch.bfloat16
    config.architectures = [type(skeleton).__name__]
    (out / "source.json").write_text(json.dumps({"gguf": path.name, "sha256": file_sha256(path)}))
    config.save_pretrained(out)  # last: its presence says that the folder is complete
