"""One training run: prepared, stepped through, stopped, and written up."""
