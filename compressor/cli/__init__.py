"""The command line: it parses, calls, prints."""

from compressor.cli import commands, comparisons
from compressor.cli.app import app, main

__all__ = ["app", "commands", "comparisons", "main"]
