"""Tests of this folder need a real NVIDIA GPU, and say so where there is none."""

from __future__ import annotations

import pytest

from pytest_vram.drygpu import real_gpu_present


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not real_gpu_present():
        here = [item for item in items if "gpu" in item.path.parent.parts]
        for item in here:
            item.add_marker(pytest.mark.skip(reason="needs a real NVIDIA GPU"))
