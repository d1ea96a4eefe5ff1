"""What ``activate`` refuses, and what the message says."""

from __future__ import annotations

import json
from unittest import mock

from pytest_vram.drygpu import activate, driver
from pytest_vram.errors import VramError

answers: dict[str, str] = {}


def refused(question: str, **arguments: object) -> None:
    try:
        activate(**{"card": "l4", "replace_real_gpu": True, **arguments})
        answers[question] = "accepted"
    except VramError as error:
        answers[question] = f"{type(error).__name__}: {error}"


refused("unknown card", card="rtx-4008")
refused("no devices", count=0)
refused("too many devices", count=65)
refused("context above total", total_bytes=2**20)
with mock.patch("pytest_vram.drygpu.process.activate.real_gpu_present", return_value=True):
    refused("a real GPU", replace_real_gpu=False)
with mock.patch.dict("sys.modules", {"torch": mock.Mock()}):
    refused("torch first")
refused("in time")
refused("the same again")
refused("another card, not seen yet", card="t4")
driver.device_count()
refused("another card, seen", card="l4", count=2)
assert driver.is_active()
print(json.dumps(answers))
