"""Tests under ``@given``: each hypothesis example is measured by itself, and the worst one counts."""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from pytest_vram.plugin.meter import Meter

_SHOWN = 300  # characters of an example's arguments


@contextlib.contextmanager
def measuring_examples(item: pytest.Item, meter: Meter) -> Iterator[None]:
    """Measure each hypothesis example while the test runs, by wrapping the function that hypothesis calls for it.

    Tests that do not use hypothesis are left as they are.
    """
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None or not hasattr(handle, "inner_test"):
        yield
        return
    inner = handle.inner_test
    handle.inner_test = _measured(inner, meter)
    # Garbage is collected before each example. gc.freeze() excludes the objects that exist already, to keep that fast.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        handle.inner_test = inner


def _measured(inner: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    @functools.wraps(inner)
    def run(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        shown = ", ".join(f"{name}={value!r}" for name, value in kwargs.items() if name not in ("gpu", "vram"))
        with meter.example(shown[:_SHOWN]):
            return inner(*args, **kwargs)

    return run
