"""Hypothesis profiles: ``ci`` tries the same examples every time, ``nightly`` a hundred times as many.

``HYPOTHESIS_PROFILE=nightly pytest tests/properties`` selects the second. A property whose examples take long tries a
share of the profile's examples (``settings(max_examples=settings.default.max_examples // 5)``), never a number of its
own, so that both profiles reach every property.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# The reference codec, which several folders of tests hold the packages against: `from reference import nf4`.
sys.path.insert(0, str(Path(__file__).parent))

# If a shell starts the tests in the background, they ignore Ctrl-C, and so would the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start hundreds of programs that import the packages. With compiled files a start is 0.3 seconds shorter.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Workers that run side by side share the cores, so each worker and its children use one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW_MACHINES_ARE_NOT_BUGS = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "ci",
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=SLOW_MACHINES_ARE_NOT_BUGS,
)
settings.register_profile(
    "nightly",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=SLOW_MACHINES_ARE_NOT_BUGS,
)
# Tries the examples of ``ci``, and stops at the first that fails: see mutation.py.
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Undo what a test changes in the environment, because the programs of later tests inherit it.

    A program's own ``main``, called in this process, may choose how torch's allocator works.
    """
    before = dict(os.environ)
    yield
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if before.get(name) != os.environ.get(name):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def pytest_report_header() -> str:
    """Say which kind of processor the tests run on: bitsandbytes and torch compute differently with AVX-512."""
    try:
        facts = dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    except OSError:
        return f"processor: {platform.processor() or platform.machine()}"
    flags = set(facts.get("flags", "").split())
    kinds = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16"}
    found = [kind for flag, kind in kinds.items() if flag in flags]
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    told = f"; torch is held to {limit}" if limit else ""
    return f"processor: {facts.get('model name', platform.machine())}, {found[-1] if found else 'no AVX2'}{told}"


TIERS = ("test_architecture.py", "unit", "plugin", "properties", "budgets", "e2e", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the fast folders first, so that most mistakes show in the first minute."""
    root = Path(__file__).parent

    def tier(item: pytest.Item) -> int:
        top = item.path.relative_to(root).parts[0] if item.path.is_relative_to(root) else ""
        return TIERS.index(top) if top in TIERS else len(TIERS)

    items.sort(key=tier)
