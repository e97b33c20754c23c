"""A gate's result as people and machines read it: terminal, job summary, JUnit, GitHub annotations.

All take the JSON document of a result (a mapping) and return a string; nothing is written, nothing is measured.
"""

from compressor.gates.output.github import to_github
from compressor.gates.output.junit import to_junit
from compressor.gates.output.markdown import COMMENT_BYTES, SUMMARY_BYTES, to_markdown
from compressor.gates.output.text import to_text

__all__ = ["COMMENT_BYTES", "SUMMARY_BYTES", "to_github", "to_junit", "to_markdown", "to_text"]
