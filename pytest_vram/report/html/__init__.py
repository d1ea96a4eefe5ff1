"""One self-contained page: a table that needs no JavaScript, and charts that do; no request leaves it."""

from pytest_vram.report.html.page import render

__all__ = ["render"]
