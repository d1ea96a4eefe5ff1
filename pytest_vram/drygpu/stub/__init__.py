"""Compiles the stub libraries for the installed PyTorch."""
