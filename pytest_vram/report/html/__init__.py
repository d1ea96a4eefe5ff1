"""Render a report as one HTML file that loads nothing. The table works without JavaScript, the charts need it."""

from pytest_vram.report.html.page import render

__all__ = ["render"]
