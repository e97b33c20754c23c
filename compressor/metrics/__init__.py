"""What a model is worth: accuracy, routing, memory, latency, and the machine it was measured on."""

from compressor.metrics.accuracy import measure_accuracy, measure_baseline, token_kl, token_nll
from compressor.metrics.accuracy_result import AccuracyResult
from compressor.metrics.baseline_states import BaselineStates, TextSet, window_bytes
from compressor.metrics.bootstrap import bootstrap_mean, bootstrap_median
from compressor.metrics.environment import describe_environment
from compressor.metrics.latency import measure_latency
from compressor.metrics.memory import (
    PeakMemory,
    file_bytes,
    kv_bytes_per_token,
    measure_memory,
    weight_bytes,
)
from compressor.metrics.routing import RoutingCounts, RoutingResult, measure_routing

__all__ = [
    "AccuracyResult",
    "BaselineStates",
    "PeakMemory",
    "RoutingCounts",
    "RoutingResult",
    "TextSet",
    "bootstrap_mean",
    "bootstrap_median",
    "describe_environment",
    "file_bytes",
    "kv_bytes_per_token",
    "measure_accuracy",
    "measure_baseline",
    "measure_latency",
    "measure_memory",
    "measure_routing",
    "token_kl",
    "token_nll",
    "weight_bytes",
    "window_bytes",
]
