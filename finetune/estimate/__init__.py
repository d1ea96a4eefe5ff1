"""The memory of a run by arithmetic, from a model's configuration alone."""
