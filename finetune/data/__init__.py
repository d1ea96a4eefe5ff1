"""Reads the rows of a data set, turns them into tokens, and makes the batches of each training step."""
