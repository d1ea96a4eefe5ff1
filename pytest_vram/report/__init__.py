"""Render a report for the terminal and as JSON, Markdown, CSV and HTML."""
