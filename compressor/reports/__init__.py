"""The report of a run, its parts, and how a person reads it."""

from compressor.reports.delta import Delta, paired_ratio
from compressor.reports.estimate import Estimate
from compressor.reports.items import Pair, TaskItem, pair_items, read_items, task_items
from compressor.reports.ledger import ExpertRow, Ledger, LedgerRow, check_complete
from compressor.reports.markdown import to_markdown
from compressor.reports.measurement import (
    Accuracy,
    Behaviour,
    Latency,
    LayerRouting,
    Measurement,
    Memory,
    worst_domain,
    worst_domain_by_kl,
)
from compressor.reports.report import SCHEMA, Baseline, Export, Report, Step

__all__ = [
    "SCHEMA",
    "Accuracy",
    "Baseline",
    "Behaviour",
    "Delta",
    "Estimate",
    "ExpertRow",
    "Export",
    "Latency",
    "LayerRouting",
    "Ledger",
    "LedgerRow",
    "Measurement",
    "Memory",
    "Pair",
    "Report",
    "Step",
    "TaskItem",
    "check_complete",
    "pair_items",
    "paired_ratio",
    "read_items",
    "task_items",
    "to_markdown",
    "worst_domain",
    "worst_domain_by_kl",
]
