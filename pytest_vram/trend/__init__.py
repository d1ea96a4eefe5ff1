"""Peaks over commits: recorded by sessions, compared along the history of the repository, drawn, and bisected."""
