"""From what the user wrote to a Model: a folder, a hub id, a GGUF file or a demo model."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.checkpoint import CheckpointReader
from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.models.demo import DEMO_MODELS, demo_model
from compressor.models.families import family_of
from compressor.models.gguf_source import dense_folder
from compressor.models.model import Model, Source
from compressor.models.packed_source import is_packed
from compressor.models.transformers_io import build_skeleton, exact_embedding_scale, read_config

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(name: str, *, dtype: str = "auto") -> Model:
    """A stored model, ready to be walked; only config, tokenizer, embedding and head are read.

    `name`: local folder, `.gguf` file, `demo/...`, or `org/name[@revision]` (asks the hub). UnsupportedModel,
    EnvironmentProblem and IntegrityError say what is wrong and where.
    """
    source = resolve(name)
    config = read_config(source.path)
    family = family_of(config.model_type, str(source.path))
    is_packed(config)  # refuses other quantized checkpoints before anything is read
    reader = CheckpointReader(source.path)
    skeleton = build_skeleton(config, _dtype(dtype, config), family)
    return Model(source, skeleton, load_tokenizer(source.path), family, reader)


def wrap_live(module: nn.Module, tokenizer: Any = None) -> Model:
    """A transformers model in memory as a Model: passes change it in place."""
    config: Any = module.config
    name = getattr(config, "_name_or_path", "") or type(module).__name__
    family = family_of(config.model_type, name)
    exact_embedding_scale(module, family)
    return Model(Source(name, Path(name)), module, tokenizer, family, reader=None)


def resolve(name: str) -> Source:
    """Where a model's files are; fetches a hub id."""
    if name.startswith("demo/"):
        path = demo_model(name)
        return Source(name, path if path.is_dir() else dense_folder(path), licence="apache-2.0")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(name, dense_folder(path))
    if path.is_dir():
        return Source(name, path)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or not HUB_ID.match(name):
        raise UnsupportedModel(
            f"there is no model at {name!r}; possible are a folder, a .gguf file, org/name[@revision], "
            f"{', '.join(DEMO_MODELS)}"
        )
    return _from_hub(name)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights."""
    from transformers import AutoTokenizer

    # Without a file, transformers makes an empty tokenizer of the model's class, which knows no word
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise EnvironmentProblem(f"{folder}: no tokenizer here; expected one of {', '.join(TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{folder}: no usable tokenizer: {error}") from error


def _from_hub(name: str) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
    try:
        info = HfApi().model_info(repository, revision=revision or None)
        folder = snapshot_download(repository, revision=info.sha, allow_patterns=wanted)
    except RepositoryNotFoundError as error:
        raise UnsupportedModel(f"{name!r} is neither a folder here nor a model on the hub ({error})") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise EnvironmentProblem(f"{name!r} is not a folder here, and the hub did not give it: {error}") from error
    licence = getattr(info.card_data, "license", None) if info.card_data else None
    return Source(name, Path(folder), info.sha, licence if isinstance(licence, str) else None)


def _dtype(wanted: str, config: Any) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
