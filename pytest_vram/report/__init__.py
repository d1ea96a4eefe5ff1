"""Report -> terminal, JSON, Markdown, CSV, HTML."""
