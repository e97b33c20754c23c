"""The report as one page for a browser: no script, no request, readable in print and without colour."""

from compressor.reports.html.page import MAX_BYTES, to_html

__all__ = ["MAX_BYTES", "to_html"]
