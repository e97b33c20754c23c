"""All use of transformers' loading internals: a skeleton without weights, and checkpoint tensors into and out of it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from compressor.errors import IntegrityError, UnsupportedModel
from compressor.models.families import Family, family_of


def read_config(folder: Path) -> Any:
    """The model's config; names the file if it is missing or broken, and a family that is not known."""
    family_of(read_model_type(folder), str(folder))  # before transformers, which has errors of its own for that
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_model_type(folder: Path) -> str:
    """What a folder's config.json calls its family, known or not."""
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except FileNotFoundError:
        raise UnsupportedModel(f"{folder} has no config.json: not a transformers checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: not valid JSON ({error})") from None
    if model_type is None:
        raise UnsupportedModel(f"{path} names no model_type")
    return model_type


def build_skeleton(config: Any, dtype: torch.dtype, family: Family) -> PreTrainedModel:
    """The model's modules with weights on the meta device; buffers, which no checkpoint holds, are real."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    attention = "sdpa" if architecture._supports_sdpa else "eager"  # as stock chooses; Gemma 2 caps attention's scores
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    rotary = skeleton.get_submodule(family.rotary)
    skeleton.set_submodule(family.rotary, type(rotary)(config=config))
    exact_embedding_scale(skeleton, family)
    absent = [name for name, buffer in skeleton.named_buffers() if buffer.is_meta]
    assert not absent, f"{config.model_type}: nothing fills the buffers {absent}"
    skeleton.requires_grad_(False)
    return skeleton.eval()


def exact_embedding_scale(skeleton: nn.Module, family: Family) -> None:
    """The factor of Gemma's embedding in float32, also in a bfloat16 model.

    Its forward rounds it to the weight's dtype in any case. Stored in bfloat16 it would stay rounded (55.5 in place of
    sqrt(3072) = 55.43) where exact arithmetic widens the model, and differ from the same model loaded in float32.
    """
    embedding: Any = skeleton.get_submodule(family.embedding)
    if hasattr(embedding, "scalar_embed_scale"):
        device = "cpu" if embedding.embed_scale.is_meta else embedding.embed_scale.device
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=torch.float32, device=device)


def load_tensors(skeleton: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> set[str]:
    """Put checkpoint tensors (names on disk) into the skeleton through transformers' own conversion.

    Returns the names that the model has no place for. IntegrityError where a shape does not fit.
    """
    mapping: Any = get_model_conversion_mapping(skeleton)
    config = LoadStateDictConfig(dtype=dtype, device_map={"": "cpu"}, weight_mapping=mapping)
    with quiet(), synchronous():
        info, _ = convert_and_load_state_dict_in_model(skeleton, dict(tensors), config)
    for name, found, expected in sorted(info.mismatched_keys):
        raise IntegrityError(f"{where}: {name} has shape {list(found)}, the config asks for {list(expected)}")
    for name, problem in info.conversion_errors.items():
        raise IntegrityError(f"{where}: {name} cannot be converted: {problem}")
    # Old checkpoints store rotary frequencies in every layer; transformers drops them too, they follow from the config
    return {name for name in info.unexpected_keys if not name.endswith("rotary_emb.inv_freq")}


def disk_names(skeleton: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that `save_pretrained` would give them (stacked experts come apart)."""
    skeleton_conversions = getattr(skeleton, "_weight_conversions", None)
    # set by the last load_tensors call, and only what that call used: the default mapping is the complete one
    skeleton._weight_conversions = None  # type: ignore[assignment]
    try:
        return revert_weight_conversion(skeleton, tensors)
    finally:
        skeleton._weight_conversions = skeleton_conversions  # type: ignore[assignment]


def missing_weights(module: nn.Module) -> list[str]:
    """Parameters that are still without data."""
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


@contextmanager
def quiet() -> Iterator[None]:
    """No transformers progress bars or chatter while we load piece by piece."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def synchronous() -> Iterator[None]:
    """Loading threads would hold a second copy of the tensors."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before
