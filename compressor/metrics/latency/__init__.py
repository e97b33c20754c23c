"""How long a model takes to load, to read a prompt and to write each next token, side by side with the baseline.

Both models run in this process, in turns: A B B A or B A A B. On a loaded machine medians of separate blocks were off
by more than 5 % in 14 % of trials, ratios of turns in none (benchmarks/latency_gate.py has the present figures).
"""

from compressor.metrics.latency.loading import LoadTimes, measure_loading
from compressor.metrics.latency.measuring import measure_latency
from compressor.metrics.latency.ratio import is_decided, paired_ratio

__all__ = ["LoadTimes", "is_decided", "measure_latency", "measure_loading", "paired_ratio"]
