"""What distillation and recovery share."""

from compressor.training.loop import Fitted, Schedule, fit

__all__ = ["Fitted", "Schedule", "fit"]
