"""Tasks: what a model is asked, how it is scored in batches, and what its answers are worth."""

from compressor.metrics.tasks.calibration import Bin, calibration_error, reliability
from compressor.metrics.tasks.encoding import Request, encode, max_length
from compressor.metrics.tasks.generating import Generated, generate_greedily
from compressor.metrics.tasks.harness import harness
from compressor.metrics.tasks.measuring import measure_tasks
from compressor.metrics.tasks.options import (
    Classification,
    Cloze,
    Contexts,
    CrowsPairs,
    Generation,
    MinimalPairs,
    MultipleChoice,
    Task,
    Winobias,
)
from compressor.metrics.tasks.questions import Question, perturbed, read_task
from compressor.metrics.tasks.scoring import Scored, loglikelihoods, measure_noise
from compressor.metrics.tasks.summary import TasksResult, flips, summarise

__all__ = [
    "Bin",
    "Classification",
    "Cloze",
    "Contexts",
    "CrowsPairs",
    "Generated",
    "Generation",
    "MinimalPairs",
    "MultipleChoice",
    "Question",
    "Request",
    "Scored",
    "Task",
    "TasksResult",
    "Winobias",
    "calibration_error",
    "encode",
    "flips",
    "generate_greedily",
    "harness",
    "loglikelihoods",
    "max_length",
    "measure_noise",
    "measure_tasks",
    "perturbed",
    "read_task",
    "reliability",
    "summarise",
]
