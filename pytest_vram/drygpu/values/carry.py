"""Carries the values of small tensors through the operators of a dry GPU.

The operators listed in ``CARRIED`` get a Python kernel in front of their CUDA kernel. The CUDA kernel runs first and
makes every allocation that a real card would see; then, if all inputs are known and the result is small, the same
operator runs on CPU views of the same memory, which allocates nothing on the device. Operators that are not listed
(matrix products, attention, normalizations, ...) are left as they are, and their results are unknown.

What a kernel writes is not known. So every other operator that writes to a tensor of the caller gets a kernel that
forgets what was known of that tensor, and so do the operators in ``FILLED_FIRST``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from pytest_vram import torch_private
from pytest_vram.drygpu import driver
from pytest_vram.drygpu.process import inductor
from pytest_vram.drygpu.values import (
    checks,
    collectives,
    guesses,
    host_reads,
    kernels,
    known_values,
    lagging_streams,
    pinned_copies,
    sparse,
    substitutes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch._ops import OpOverload

# fmt: off
CARRIED = (
    "abs", "add", "addcdiv", "addcmul", "all", "amax", "amin", "aminmax",
    "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_", "any", "arange", "argmax", "argmin",
    "atan", "atan2", "bernoulli_", "bincount", "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or",
    "bitwise_right_shift", "bitwise_xor", "bucketize", "cat", "ceil", "clamp", "clamp_max", "clamp_min",
    "_convert_indices_from_coo_to_csr", "_convert_indices_from_csr_to_coo", "copy_", "cos", "count_nonzero",
    "cummax", "cummin", "cumprod", "cumsum", "div", "dot", "eq", "equal", "erf", "exp", "exp2", "expm1",
    "exponential_", "eye", "fill_", "flip", "floor", "floor_divide", "fmod", "frac", "gather", "gcd", "ge",
    "geometric_", "gt", "heaviside", "histc", "hypot", "index", "index_add", "index_copy", "index_fill",
    "_index_put_impl_", "index_select", "isin", "isinf", "isnan", "isneginf", "isposinf", "kthvalue", "lcm", "le",
    "lerp", "linalg_vector_norm", "linspace", "_local_scalar_dense", "log", "log10", "log1p", "log2",
    "log_normal_", "logical_and", "logical_not", "logical_or", "logical_xor", "logspace", "lt", "masked_fill",
    "masked_fill_", "masked_scatter", "masked_scatter_", "masked_select", "max", "maximum", "mean", "median",
    "min", "minimum", "mode", "mul", "multinomial", "nan_to_num", "nanmedian", "nansum", "ne", "neg", "nonzero",
    "nonzero_static", "normal_", "pow", "prod", "put_", "random_", "randperm", "range", "reciprocal",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "remainder", "repeat_interleave", "resize", "roll",
    "round", "rsqrt", "rsub", "scatter", "scatter_add", "scatter_reduce", "searchsorted", "sgn", "sigmoid", "sign",
    "sin", "sort", "sqrt", "std", "sub", "sum", "take", "tan", "tanh", "topk", "trace", "tril", "tril_indices",
    "triu", "triu_indices", "trunc", "unfold_backward", "uniform_", "_unique", "_unique2", "unique_consecutive",
    "unique_dim", "unique_dim_consecutive", "var", "where", "xlogy", "zero_",
)
FILLED_FIRST = frozenset({
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "addbmm", "baddbmm", "_conv_depthwise2d", "conv_depthwise3d",
    "index_reduce", "linalg_matrix_exp", "linalg_solve_triangular", "lu_unpack",
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices", "max_unpool2d", "max_unpool3d",
    "multi_margin_loss", "multilabel_margin_loss_forward", "nll_loss2d_forward", "_pdist_forward",
    "_slow_conv2d_forward", "slow_conv_dilated2d", "slow_conv_dilated3d", "std_mean", "triangular_solve", "var_mean",
})
# fmt: on
"""Operators that are not carried, and whose own code fills or copies into their results before a kernel writes them.

The list was found by comparing every operator in PyTorch's own database of operators with the CPU.
"""

_CARRIED = frozenset(CARRIED)
_WRITE_ONLY = {"copy_", "fill_", "zero_", "arange", "eye", "linspace", "range", "randperm", *guesses.DRAWS}
_SIZED_BY_DATA = {"nonzero", *guesses.DISTINCT}
_LONGEST_ROW_OF_ONE_KERNEL = 2048
"""``mode`` reads nothing back for rows of at most this length (TensorModeKernel.cu of torch 2.6 to 2.15)."""

_LEAVES_VALUES = {"record_stream", "set_"}
"""Operators whose schemas say that they write to a tensor, and that change none of its elements."""

_NUMBER_ON_DEVICE = frozenset({"aten::pow.Tensor_Tensor_out"})
"""Operators that torch's own code calls with a number in device memory, which the dispatcher cannot pass to Python."""

_library: torch.library.Library | None = None
_collectives: torch.library.Library | None = None


def install() -> None:
    """Put the kernels in place, and list reads from now on. A second call does nothing."""
    global _library, _collectives
    if _library is not None:
        return
    driver.set_read_hook(host_reads.on_read)
    inductor.install()
    _library = torch.library.Library("aten", "IMPL")
    for overload in _overloads():
        kernels.put_in_front(_library, overload, functools.partial(_carrying, overload))
    checks.install(_library)
    sparse.install(_library)
    substitutes.install(_library)
    lagging_streams.install(_library)
    pinned_copies.install(_library)
    for overload in _overwriting():
        kernels.put_in_front(_library, overload, functools.partial(_carrying, overload))
    if torch.distributed.is_available():
        _collectives = torch.library.Library("c10d", "IMPL")
        collectives.install(_collectives)


def _carrying(overload: OpOverload, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that runs ``call``, which is torch's own kernel, and then carries the values."""
    return _Operator(overload, call).kernel()


def _overwriting() -> Iterator[OpOverload]:
    """Yield all other overloads that write to a tensor of the caller: in place, to ``out``, or to lists of tensors."""
    for name, overload_name in torch_private.operators_with_kernel("aten", "CUDA"):
        if _is_in(name, _CARRIED) or _is_in(name, FILLED_FIRST) or name in _LEAVES_VALUES:
            continue
        overload = getattr(getattr(torch.ops.aten, name, None), overload_name or "default", None)
        if overload is not None and _written(overload._schema):
            yield overload


def _is_in(name: str, operators: frozenset[str]) -> bool:
    """Return whether an operator, or the one whose in-place form it is, is in a list."""
    return name in operators or name.removesuffix("_") in operators


def _written(schema: Any) -> list[int]:
    """Return the positions of the arguments that an operator writes to."""
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _overloads() -> Iterator[OpOverload]:
    """Yield the overloads of ``CARRIED`` and of their in-place forms that have a CUDA kernel of their own."""
    for base in (*CARRIED, *FILLED_FIRST):
        for name in (base, f"{base}_"):
            packet = getattr(torch.ops.aten, name, None)
            for overload_name in packet.overloads() if packet is not None else ():
                label = f"aten::{name}.{overload_name}".removesuffix(".default")
                # The dispatcher does not know the overloads for TorchScript's scalars, so they have no kernel.
                # copy_ has one kernel for all devices.
                if label in _NUMBER_ON_DEVICE or not torch_private.has_kernel(label):
                    continue
                if torch_private.has_kernel(label, "CUDA") or label == "aten::copy_":
                    yield getattr(packet, overload_name)


class _Operator:
    """One overload, with its CUDA kernel and the facts from its schema that carrying needs."""

    def __init__(self, overload: OpOverload, call: Callable[..., Any]) -> None:
        schema = overload._schema
        self.overload, self.call = overload, call
        self.name = schema.name.removeprefix("aten::")
        arguments = schema.arguments
        self.numbers = kernels.Numbers(overload)
        writes = _written(schema)
        self.mutates = bool(writes)
        self.written_keys = tuple(arguments[i].name for i in writes if arguments[i].kwarg_only)
        self.written = tuple(i for i in writes if not arguments[i].kwarg_only)
        self.keeps_nothing = self.name in _WRITE_ONLY
        self.guess = guesses.HANDLERS.get(self.name)

    def kernel(self) -> Callable[..., Any]:
        """Return the function to register with the dispatcher."""
        if not (_is_in(self.name, _CARRIED) or self.name.startswith("_foreach_")):
            return self._overwrite if self.mutates else self._fill_first
        if self.name == "_local_scalar_dense":
            return self._read_scalar
        if self.name == "copy_":
            return self._copy
        if self.name == "equal":
            return self._compare
        if self.name == "resize_":
            return self._resize
        if self.name in _SIZED_BY_DATA:
            return self._run_sized
        if self.name == "mode":
            return self._search
        if self.mutates:
            return self._run_mutating
        return self._run

    # -- kinds of operators ------------------------------------------------------------------------------------------

    def _run(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        args = self.numbers.as_tensors(args)
        result = self.call(keyset, *args, **kwargs)
        first = result[0] if type(result) in (tuple, list) else result
        if isinstance(first, torch.Tensor) and (known_values.is_carried(first) or self.guess is not None):
            self._carry(result, args, kwargs)
        return result

    def _run_mutating(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        args = self.numbers.as_tensors(args)
        result = self.call(keyset, *args, **kwargs)
        outputs = self._outputs(args, kwargs)
        if all(known_values.is_carried(output) for output in outputs):
            known, guess = known_values.vouch(self._inputs(args, kwargs))
            if known and self._on_cpu(args, kwargs) is not None:
                for output in outputs:
                    known_values.learn(output, guess)
                return result
        for output in outputs:
            known_values.forget(output)
        if self.guess is not None:
            self.guess(outputs, args, kwargs)
        return result

    def _run_sized(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        known, guess = known_values.vouch(args)
        if known and all(known_values.is_carried(a) for a in args if isinstance(a, torch.Tensor)):
            answer = self._on_cpu(args, {key: value for key, value in kwargs.items() if key not in self.written_keys})
        else:
            answer = None
        if answer is not None:
            count = int(_parts(answer)[0].shape[guesses.counted_dimension(self.name, args, kwargs) or 0])
        else:
            count, guess = guesses.size(self.name, args, kwargs)
        with host_reads.reading(host_reads.Announced(operation=self.name, count=count, whole=True)):
            result = self.call(keyset, *args, **kwargs)
        host_reads.note(self.name, answered=True, remark=guess)
        if answer is not None:
            _store(result, answer, guess)
        elif self.guess is not None:
            self.guess((result,), args, kwargs)
        return result

    def _overwrite(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operator whose values are not carried. The values that it has written are unknown."""
        args = self.numbers.as_tensors(args)
        result = self.call(keyset, *args, **kwargs)
        for output in self._outputs(args, kwargs):
            known_values.forget(output)
        return result

    def _fill_first(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operator that fills its results with known values before it computes them. The results are unknown."""
        result = self.call(keyset, *self.numbers.as_tensors(args), **kwargs)
        for part in _parts(result):
            known_values.forget(part)
        return result

    def _search(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``mode``, which sorts a long row, counts equal values, and fails unless it finds the answer in the row.

        Each read returns an odd number, because "found" is the lowest bit of what is read, and one as large as the row:
        if all values differ, the counts take the most memory.
        """
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        length = args[0].shape[dim] if args[0].dim() else 1
        with host_reads.reading(host_reads.Announced(operation=self.name, count=length | 1, whole=True)):
            result = self._run(keyset, *args, **kwargs)
        if not known_values.vouch(args)[0]:
            for part in result:
                known_values.forget(part)  # the position was taken from what the reads returned
            if length > _LONGEST_ROW_OF_ONE_KERNEL:
                host_reads.note(self.name, answered=True, remark=guesses.ALL_DISTINCT)
        return result

    def _read_scalar(self, keyset: Any, tensor: torch.Tensor) -> Any:
        entry = known_values.find(tensor)
        announced = host_reads.Announced(operation="item", known=entry is not None, guess=entry.guess if entry else "")
        if entry is None and tensor.dtype == torch.bool and host_reads.is_check():
            announced = host_reads.Announced(operation="item", count=1)
            host_reads.note("item", answered=True, remark=guesses.PASSED)
        with host_reads.reading(announced):
            answer = self.call(keyset, tensor)
        return answer if entry is None else known_values.on_cpu(tensor).item()

    def _compare(self, keyset: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
        known, guess = known_values.vouch((left, right))
        with host_reads.reading(host_reads.Announced(operation="equal", known=known, guess=guess, whole=True)):
            answer = self.call(keyset, left, right)
        return torch.equal(known_values.on_cpu(left), known_values.on_cpu(right)) if known else answer

    def _copy(self, keyset: Any, destination: torch.Tensor, source: Any, non_blocking: bool = False) -> torch.Tensor:
        if not isinstance(source, torch.Tensor):
            source = kernels.scalar(source, destination)
        on_device, from_device = destination.device.type == "cuda", source.device.type == "cuda"
        known, guess = known_values.vouch((source,))
        if from_device and not on_device:
            with host_reads.reading(host_reads.Announced(operation="copy to host", known=known, guess=guess)):
                result: torch.Tensor = self.call(keyset, destination, source, non_blocking)
            if known:  # a strided source was copied through a device buffer that no kernel filled
                destination.detach().copy_(known_values.on_cpu(source))
            return result
        result = self.call(keyset, destination, source, non_blocking)
        if known and known_values.is_carried(destination):
            known_values.on_cpu(destination).copy_(known_values.on_cpu(source))
            known_values.learn(destination, guess)
        else:
            known_values.forget(destination)
        return result

    def _resize(self, keyset: Any, tensor: torch.Tensor, size: Any, **kwargs: Any) -> torch.Tensor:
        """Resize a tensor: its elements keep their values in order of memory, and new elements are 0.

        On a card, new elements hold arbitrary values.
        """
        known, guess = known_values.vouch((tensor,))
        before = known_values.on_cpu(tensor).reshape(-1).clone() if known and known_values.is_carried(tensor) else None
        result: torch.Tensor = self.call(keyset, tensor, size, **kwargs)
        if before is None or not known_values.is_carried(tensor):
            known_values.forget(tensor)
        elif tensor.numel() > len(before):
            flat = known_values.on_cpu(tensor).view(-1)
            flat.zero_()
            flat[: len(before)] = before
            known_values.learn(tensor, guess)
        return result

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _on_cpu(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the operator's result on the CPU, or None if the CPU has no such kernel or must not run it.

        The result is () if the operator returns nothing, as those do that write to lists of tensors.
        """
        if self.name in guesses.NOT_ON_CPU:
            return None
        try:
            if self.name == "histc" and not self.mutates and args[0].dtype in known_values.WHOLE_NUMBERS:
                # The CPU counts floats only, and a double has room for every number that is counted here.
                first, *others = _to_cpu(args)
                return self.overload(first.double(), *others, **_to_cpu(kwargs)).to(first.dtype)
            answer = self.overload(*_to_cpu(args), **_to_cpu(kwargs))
        except (RuntimeError, IndexError):  # the CPU kernel does not take the type, or a GPU would assert on an index
            return None
        return () if answer is None else answer

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for value in (*(args[i] for i in self.written if i < len(args)), *(kwargs.get(k) for k in self.written_keys)):
            found.extend(value if isinstance(value, list | tuple) else [value] if value is not None else [])
        return found

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        inputs = [a for i, a in enumerate(args) if not (self.keeps_nothing and i in self.written)]
        return inputs + [value for key, value in kwargs.items() if key not in self.written_keys]

    def _carry(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known, guess = known_values.vouch((*args, *kwargs.values()))
        answer = self._on_cpu(args, kwargs) if known else None
        if answer is not None:
            _store(result, answer, guess)
            return
        outputs = _parts(result)
        for output in outputs:
            known_values.forget(output)  # torch's own kernel may have filled it first
        if self.guess is not None:
            self.guess(outputs, args, kwargs)


def _parts(result: Any) -> Sequence[Any]:
    """Return the results of an operator, of which most have one."""
    return result if isinstance(result, tuple | list) else (result,)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return known_values.on_cpu(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value


def _store(result: Any, answer: Any, guess: str) -> None:
    """Write the result that the CPU computed to the memory of the device's result."""
    if isinstance(result, torch.Tensor):
        if result.shape == answer.shape and known_values.is_carried(result):
            known_values.on_cpu(result).copy_(answer)
            known_values.learn(result, guess)
    elif isinstance(result, tuple | list):
        for part, part_answer in zip(result, answer, strict=True):
            _store(part, part_answer, guess)
