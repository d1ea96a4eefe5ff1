"""For programs of many checks: runs each, prints what each returned or how it failed, as one line of JSON."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

Check = Callable[[], Any]


class Checks:
    """Collects checks by decorator; ``run`` runs them all, whatever fails."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def __call__(self, check: Check) -> Check:
        self._checks[check.__name__] = check
        return check

    def run(self) -> None:
        results: dict[str, Any] = {}
        for name, check in self._checks.items():
            try:
                results[name] = {"value": check()}
            except Exception:
                results[name] = {"error": traceback.format_exc()[-1500:]}
        print(json.dumps(results))
