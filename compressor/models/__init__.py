"""How a transformers model is put together; only this part knows transformers' insides and family names."""

from compressor.models.anatomy import Block, ExpertStack, WeightSite, dequantized, in_float32
from compressor.models.decoder import DESCRIBED, Decoder, attention_scale, describe_decoder, norm_weight
from compressor.models.decoding import StaticDecoder
from compressor.models.demo import DEMO_MODELS, demo_task, demo_texts
from compressor.models.families import FAMILIES, family_of
from compressor.models.loading import load_model, load_tokenizer, resolve, wrap_live
from compressor.models.model import Head, Model, Source
from compressor.models.observation import Routed, observe_experts
from compressor.models.packed_source import is_packed
from compressor.models.transformers_io import build_skeleton, disk_names, read_config, read_model_type

__all__ = [
    "DEMO_MODELS",
    "DESCRIBED",
    "FAMILIES",
    "Block",
    "Decoder",
    "ExpertStack",
    "Head",
    "Model",
    "Routed",
    "Source",
    "StaticDecoder",
    "WeightSite",
    "attention_scale",
    "build_skeleton",
    "demo_task",
    "demo_texts",
    "dequantized",
    "describe_decoder",
    "disk_names",
    "family_of",
    "in_float32",
    "is_packed",
    "load_model",
    "load_tokenizer",
    "norm_weight",
    "observe_experts",
    "read_config",
    "read_model_type",
    "resolve",
    "wrap_live",
]
