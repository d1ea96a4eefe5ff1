"""The commands of ``python -m pytest_vram``, a module each."""
