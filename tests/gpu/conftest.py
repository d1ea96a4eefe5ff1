"""Skips the tests of this folder, which need a real NVIDIA GPU, where there is none.

``pytest tests/gpu --vram-gpu=dry:h200`` rehearses them: the tests that want a card's values or the card itself are
skipped, and all others run as they would there. tests/e2e/test_gpu_rehearsal.py does so on every machine.
"""

from __future__ import annotations

import pytest

from pytest_vram.drygpu import driver, real_gpu_present


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rehearsed = driver.is_active()
    for item in items:
        if "gpu" not in item.path.parent.parts:
            continue
        if not rehearsed and not real_gpu_present():
            item.add_marker(pytest.mark.skip(reason="needs a real NVIDIA GPU"))
        elif rehearsed and item.get_closest_marker("real_card") is not None:
            item.add_marker(pytest.mark.skip(reason="asks what a real card is"))
