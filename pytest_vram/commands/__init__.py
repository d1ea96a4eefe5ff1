"""The commands of ``python -m pytest_vram``, one module each."""
