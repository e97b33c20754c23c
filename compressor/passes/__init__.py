"""Steps of a recipe, by the word that a recipe uses for them."""

from pydantic import BaseModel

from compressor.passes.base import Context, Pass
from compressor.passes.distill import Distill
from compressor.passes.prune import Prune
from compressor.passes.quantize import Quantize

PASSES: dict[str, type[BaseModel]] = {"prune": Prune, "distill": Distill, "quantize": Quantize}

__all__ = ["PASSES", "Context", "Distill", "Pass", "Prune", "Quantize"]
