"""Computes the memory of a run by arithmetic, from the model's configuration alone."""
