"""Find the order in which a peak grows with an argument, from a few measured sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vram.errors import VramUsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Growth of a peak with one argument.

    Attributes:
        argument: the argument's name.
        values: the sizes that were measured, ascending.
        peaks: the peak in bytes at each size.
        order: the exponent k if the growing part of the peak is proportional to the k-th power of the argument: 0 is
            no growth, 1 linear, 2 quadratic.
    """

    argument: str
    values: tuple[float, ...]
    peaks: tuple[int, ...]
    order: float


def fit(argument: str, values: Sequence[float], peaks: Sequence[int]) -> Scaling:
    """Fit the order of growth.

    The increments between neighbouring sizes do not contain what does not grow, such as weights and workspaces. For
    c x^k, the increment from x to r x is c x^k (r^k - 1). If all ratios r are equal, the increment is proportional to
    x^k, so k is the least-squares slope of log increment over log size. For unequal ratios, each increment is divided
    by r^k - 1; since that needs k itself, the fit is repeated until k no longer changes.

    Args:
        argument: name, for messages.
        values: at least three different positive sizes.
        peaks: bytes at each size.

    Raises:
        VramUsageError: too few sizes, or one that is not positive.
    """
    pairs = sorted(zip(values, peaks, strict=True))
    if len({value for value, _ in pairs}) < 3 or pairs[0][0] <= 0:
        raise VramUsageError(f"scaling of {argument!r} needs three different sizes above 0, not {list(values)!r}")
    sizes, bytes_ = [float(v) for v, _ in pairs], [p for _, p in pairs]
    steps = [
        (low, high / low, after - before)
        for low, high, before, after in zip(sizes, sizes[1:], bytes_, bytes_[1:], strict=False)
        if high > low
    ]
    grown = [(low, ratio, step) for low, ratio, step in steps if step > 0]
    order = 0.0 if len(grown) < 2 else _slope(grown)
    return Scaling(argument=argument, values=tuple(v for v, _ in pairs), peaks=tuple(bytes_), order=order)


def _slope(steps: Sequence[tuple[float, float, int]]) -> float:
    order = 1.0
    for _ in range(50):
        points = [(math.log(low), math.log(step / (ratio**order - 1))) for low, ratio, step in steps]
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        found = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        found = max(found, 1e-3)
        if abs(found - order) < 1e-9:
            break
        order = found
    return order
