"""A GPU that allocates and does not compute."""
