"""Register Python kernels in place of torch's CUDA kernels, or around them.

In torch 2.9 and later, ``torch.library.get_kernel`` returns a registered kernel, so a Python kernel can replace it and
call it. torch 2.6 to 2.8 lack that function. There, the Python kernel is registered for the dispatch key
``BackendSelect``, through which every call passes between autograd and the device's kernel, and it passes the call on
with ``OpOverload.redispatch``. Calls on CPU tensors then run through Python too, which costs some microseconds each.
The second way may go when torch 2.9 is the oldest supported version.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import torch_private

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

    Kernel = Callable[..., Any]

_NUMBERS = frozenset({int, float, bool, complex})
_SELECT = torch_private.dispatch_key("BackendSelect")
_scalars: dict[tuple[object, torch.dtype], torch.Tensor] = {}


def put_in_front(
    library: torch.library.Library, overload: OpOverload, make: Callable[[Kernel], Kernel], *, key: str = "CUDA"
) -> None:
    """Run ``make(call)`` in place of the CUDA kernel of ``overload``.

    Args:
        library: a fragment of the operator's namespace; the registration lasts as long as this object.
        overload: an operator that has a kernel for ``key``.
        make: takes ``call(keyset, *args, **kwargs)``, which runs torch's own kernel, and returns the kernel to
            register, a function of the same arguments.
        key: the dispatch key of the kernel: ``CUDA``, or ``SparseCUDA`` for sparse tensors.
    """
    if hasattr(torch.library, "get_kernel"):
        kernel = make(torch.library.get_kernel(label(overload), key).call_boxed)
        _register(library, overload, kernel, key, with_keyset=True, allow_override=True)
    else:
        _select(library, overload, make, key)


def replace(library: torch.library.Library, overload: OpOverload, kernel: Kernel) -> None:
    """Run ``kernel(*args, **kwargs)`` in place of the CUDA kernel of ``overload``, which is then never called."""
    if hasattr(torch.library, "get_kernel"):
        _register(library, overload, kernel, "CUDA", allow_override=True)
    else:
        _select(library, overload, lambda _call: lambda _keyset, *args, **kwargs: kernel(*args, **kwargs), "CUDA")


def label(overload: OpOverload) -> str:
    """Return the operator's full name as the dispatcher writes it, such as ``aten::add.Tensor`` or ``aten::topk``."""
    schema = overload._schema
    return f"{schema.name}.{schema.overload_name}".rstrip(".")


def scalar(value: complex, like: torch.Tensor | None) -> torch.Tensor:
    """Return a number as a tensor without dimensions, of the type that it has beside the tensor ``like``.

    If an operator takes a tensor and is given a number, torch makes a tensor that is marked as a number. The dispatcher
    passes it to a Python kernel as a plain number, but does not accept a plain number back.
    """
    if like is not None:
        dtype = torch.result_type(like, value)
    elif isinstance(value, bool):
        dtype = torch.bool
    else:
        dtype = torch.int64 if isinstance(value, int) else torch.get_default_dtype()
    key = (value, dtype)
    if key not in _scalars:
        if len(_scalars) >= 512:
            _scalars.clear()
        _scalars[key] = torch.tensor(value, dtype=dtype)
    return _scalars[key]


class Numbers:
    """The arguments of an operator that are tensors and for which a Python kernel may get a plain number."""

    def __init__(self, overload: OpOverload) -> None:
        arguments = enumerate(overload._schema.arguments)
        self._positions = tuple(i for i, a in arguments if str(a.type) == "Tensor" and not a.kwarg_only)
        # The condition of ``where`` takes no part in type promotion.
        self._skip = 1 if overload._schema.name.startswith("aten::where") else 0

    def as_tensors(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``args`` with each such number replaced by a tensor."""
        if not any(type(args[i]) in _NUMBERS for i in self._positions if i < len(args)):
            return args
        like = next((a for a in args[self._skip :] if isinstance(a, torch.Tensor)), None)
        return tuple(scalar(a, like) if i in self._positions and type(a) in _NUMBERS else a for i, a in enumerate(args))


def _register(library: Any, overload: OpOverload, kernel: Kernel, key: str, **how: bool) -> None:
    with warnings.catch_warnings():
        # torch 2.9 warns of an overridden kernel even if overriding is allowed explicitly.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl(label(overload).partition("::")[2], kernel, key, **how)


def _select(library: Any, overload: OpOverload, make: Callable[[Kernel], Kernel], key: str) -> None:
    """Register for ``BackendSelect``: calls for ``key`` go to what ``make`` returns, others to their own kernels."""
    if torch_private.has_kernel(label(overload), "BackendSelect"):
        return  # operators such as tril_indices, which make a tensor from numbers; their results count as unknown
    beneath, wanted = torch_private.keys_after(_SELECT), torch_private.dispatch_key(key)
    numbers = Numbers(overload)

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        return overload.redispatch(keyset & beneath, *numbers.as_tensors(args), **kwargs)

    front = make(call)

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        return (front if keyset.has(wanted) else call)(keyset, *args, **kwargs)

    _register(library, overload, kernel, "BackendSelect", with_keyset=True)
