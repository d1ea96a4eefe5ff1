"""Assume values that a dry GPU cannot know, so that a program takes the branches that it would take on a real card.

Each assumption has a label. If the program reads a value that was computed from an assumption, the list of host reads
shows the label. An assumption never changes what the operator itself allocates; it decides what the program does next.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram.drygpu.values import known_values
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SPREAD = "indices taken as spread evenly (a router's experts, sampled tokens)"
"""Routers and samplers use the same operators (topk, argmax), so the label must be true for both."""
FINITE = "values taken as finite"
ALL_TRUE = "unknown mask taken as all true"
ALL_DISTINCT = "unknown values taken as all distinct"
IN_ORDER = "unknown values taken as sorted"
PASSED = "a check of values taken as passed"
SOLVED = "a solver's error code taken as 0, no error"
DRAWN = "random numbers taken as drawn on the CPU, from the same distribution"

DRAWS = frozenset({"bernoulli_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"})
"""Operators that fill a tensor with random numbers."""

DISTINCT = frozenset({"_unique", "_unique2", "unique_consecutive", "unique_dim", "unique_dim_consecutive"})
"""Operators that find the distinct values of a tensor, or the distinct slices along one of its dimensions."""

DRAWN_LIMIT = MIB
"""The largest tensor of numbers between 0 and 1 that is drawn, in bytes: a mask over the tokens of a batch."""

NOT_ON_CPU = DRAWS | {"randperm", "multinomial", "_amp_foreach_non_finite_check_and_unscale_"}
"""These are not computed on the CPU: the last one has no CPU kernel, and the others would advance the CPU's random
generator."""


def size(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, str]:
    """Return the largest size that a result can have if it depends on unknown data, and the assumption's label."""
    dim = counted_dimension(name, args, kwargs)
    count = args[0].numel() if dim is None else args[0].shape[dim]
    return count, ALL_TRUE if name == "nonzero" else ALL_DISTINCT


def counted_dimension(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Return the dimension along which an operator compares slices; None if it looks at single elements."""
    if name.startswith("unique_dim"):
        return int(args[1])
    return _dimension(args, kwargs, 3, None) if name == "unique_consecutive" else None


def _set(tensor: torch.Tensor, values: torch.Tensor, guess: str) -> None:
    if known_values.is_carried(tensor):
        known_values.on_cpu(tensor).copy_(values)
        known_values.learn(tensor, guess)


def _integers(outputs: Sequence[Any]) -> list[torch.Tensor]:
    return [part for part in outputs if isinstance(part, torch.Tensor) and part.dtype in known_values.WHOLE_NUMBERS]


def _dimension(args: Sequence[Any], kwargs: dict[str, Any], position: int, default: int | None) -> int | None:
    found = args[position] if len(args) > position else kwargs.get("dim", default)
    return found if isinstance(found, int) else default


def _top(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle topk: row r takes the columns r*k, r*k + 1, ..., modulo their number, so all are taken equally often."""
    dim = _dimension(args, kwargs, 2, -1)
    for indices in _integers(outputs):
        _round_robin(indices, args[0].shape[dim] if args[0].dim() else 1, -1 if dim is None else dim)


def _extreme(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle argmax, and max along a dimension: consecutive rows take consecutive columns."""
    dim = _dimension(args, kwargs, 1, None)
    columns = args[0].numel() if dim is None else args[0].shape[dim]
    for indices in _integers(outputs):
        if indices.dtype == torch.int64 and args[0].dtype not in known_values.WHOLE_NUMBERS:
            positions = torch.arange(indices.numel()).remainder_(max(columns, 1)).view(indices.shape)
            _set(indices, positions, SPREAD)


def _round_robin(indices: torch.Tensor, columns: int, dim: int) -> None:
    if indices.numel() == 0 or not known_values.is_carried(indices):
        return
    if indices.dim() == 0:
        _set(indices, torch.zeros((), dtype=indices.dtype), SPREAD)
        return
    last = indices.transpose(dim, -1)
    positions = torch.arange(indices.numel()).remainder_(columns).view(last.shape).transpose(dim, -1)
    _set(indices, positions, SPREAD)


def _sorted(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle sort: assume that the values are already in order."""
    dim = kwargs.get("dim", -1)
    for indices in _integers(outputs[1:]):
        if indices.dim():
            shape = [1] * indices.dim()
            shape[dim] = indices.shape[dim]
            _set(indices, torch.arange(indices.shape[dim]).view(shape).expand(indices.shape), IN_ORDER)


def _drawn(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle multinomial, which draws tokens or rows: consecutive draws take consecutive columns."""
    for indices in _integers(outputs):
        _round_robin(indices, args[0].shape[-1], -1)


def _draw(name: str) -> Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], None]:
    """Return the handler of an operator that fills a tensor with random numbers: it draws them on the CPU.

    Where the device's generator stands decides what is drawn. A program that puts the generator back, as activation
    checkpointing does, draws the same numbers again, and so takes the same branches again.
    """

    def handle(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for drawn in outputs:
            if not (_is_drawn(name, drawn, args[1:]) and known_values.vouch(args[1:])[0]):
                continue
            parameters = [known_values.on_cpu(a) if isinstance(a, torch.Tensor) else a for a in args[1:]]
            source = torch.Generator().manual_seed(_position(kwargs.get("generator"), drawn.device))
            values = torch.empty(drawn.shape, dtype=drawn.dtype, device="cpu")
            with contextlib.suppress(RuntimeError):  # the CPU has no such kernel for the type
                known_values.on_cpu(drawn).copy_(getattr(values, name)(*parameters, generator=source))
                known_values.learn(drawn, DRAWN)

    return handle


def _is_drawn(name: str, tensor: torch.Tensor, parameters: Sequence[Any]) -> bool:
    """Return whether random numbers are drawn: more of those that masks are made of, ``torch.rand`` and Bernoulli."""
    for_masks = name == "bernoulli_" or (name == "uniform_" and tuple(parameters) in ((), (0.0,), (0.0, 1.0)))
    if for_masks and tensor.numel() * tensor.element_size() <= DRAWN_LIMIT:
        return True
    return known_values.is_carried(tensor)


def _position(generator: torch.Generator | None, device: torch.device) -> int:
    """Return a number for the seed and the offset of a generator: the program's, or that of the device."""
    try:
        state = torch.cuda.get_rng_state(device) if generator is None else generator.get_state()
    except RuntimeError:  # a generator does not tell while a graph is captured
        return 0
    return zlib.crc32(bytes(state.tolist()))


def _permutation(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for drawn in _integers(outputs):
        _set(drawn, torch.arange(drawn.numel()), IN_ORDER)


def _false(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle isnan and isinf: assume that every value is finite."""
    for answer in outputs:
        _set(answer, torch.zeros((), dtype=torch.bool), FINITE)


def _equal(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle ``x == x`` and ``x == inf``, which ``isfinite`` computes: assume that every value is finite."""
    _same_or_infinite(outputs, args, same=True)


def _unequal(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle ``x != x`` and ``x != inf``: assume that every value is finite."""
    _same_or_infinite(outputs, args, same=False)


def _same_or_infinite(outputs: Sequence[Any], args: Sequence[Any], *, same: bool) -> None:
    left, right = args[0], args[1]
    if isinstance(right, torch.Tensor) and right.dim() == 0 and right.device.type == "cpu":
        right = right.item()
    if isinstance(right, float) and math.isinf(right):
        same = not same
    elif not (isinstance(right, torch.Tensor) and right.data_ptr() == left.data_ptr() and right.shape == left.shape):
        return
    for answer in outputs:
        _set(answer, torch.full((), same, dtype=torch.bool), FINITE)


def _nothing_infinite(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle the gradient scaler's check for infinite gradients: assume that there is none."""
    _set(args[1], torch.zeros((), dtype=args[1].dtype), FINITE)


def _every_element(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle nonzero of an unknown mask: return the coordinates of all elements."""
    (coordinates,) = outputs
    _take_as_true(args[0])
    if known_values.is_carried(coordinates) and coordinates.numel():
        _set(coordinates, torch.ones(args[0].shape, dtype=torch.bool).nonzero(), ALL_TRUE)


def _all_counted(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle the number of true elements of an unknown mask: it is the number that :func:`_every_element` finds."""
    (count,) = outputs
    if args[0].dtype == torch.bool and count.dtype in known_values.WHOLE_NUMBERS and count.numel():
        _take_as_true(args[0])
        _set(count, torch.full((), args[0].numel() // count.numel(), dtype=count.dtype), ALL_TRUE)


def _each_once(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle the distinct values of unknown ones: each value occurs once, so their number and their counts agree."""
    ((_, *positions_and_counts),) = outputs
    for place, part in enumerate(positions_and_counts):
        if part.numel():
            values = torch.arange(part.numel()).view(part.shape) if place == 0 else torch.ones((), dtype=part.dtype)
            _set(part, values, ALL_DISTINCT)


def _joined(outputs: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Handle cat of some known and some unknown tensors: the parts of its result that are known stay so."""
    (result,) = outputs
    dim = _dimension(args, kwargs, 1, 0)
    if dim is None or not known_values.is_carried(result):
        return
    start = 0
    for part in args[0]:
        if not part.numel():
            continue
        known, guess = known_values.vouch((part,))
        place = result.narrow(dim, start, part.shape[dim])
        start += part.shape[dim]
        if known and part.dtype == result.dtype and place.is_contiguous():
            _set(place, known_values.on_cpu(part), guess)


def _take_as_true(mask: torch.Tensor) -> None:
    """Remember the guess for later questions about the same mask, so that they get answers that agree."""
    if mask.dtype == torch.bool:
        _set(mask, torch.ones((), dtype=torch.bool), ALL_TRUE)


HANDLERS: dict[str, Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], None]] = {
    "_amp_foreach_non_finite_check_and_unscale_": _nothing_infinite,
    "argmax": _extreme,
    "argmin": _extreme,
    "cat": _joined,
    "count_nonzero": _all_counted,
    "eq": _equal,
    "isinf": _false,
    "isnan": _false,
    "max": _extreme,
    "min": _extreme,
    "multinomial": _drawn,
    "ne": _unequal,
    "nonzero": _every_element,
    "randperm": _permutation,
    "sort": _sorted,
    "sum": _all_counted,
    "topk": _top,
    **{name: _draw(name) for name in DRAWS},
    **dict.fromkeys(DISTINCT, _each_once),
}
