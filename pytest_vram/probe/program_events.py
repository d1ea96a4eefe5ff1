"""Record when the program calls modules, runs a backward pass or an optimizer step, and what each tensor belongs to.

Torch's memory history has times of the same clock, so both together tell what each allocation is for. This module
costs nothing while it does not record.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from time import time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_vram import torch_private
from pytest_vram.probe.quantization import quantization_constants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from pytest_vram.memory.timeline import Category

_HEADS = ("lm_head", "embed_out", "score")
_ADAPTERS = re.compile("lora_|adapter|ia3_|prompt_encoder|modules_to_save")
_WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.|_orig_mod\.)+")


Step = tuple[int, str, str, bool]
"""One event of the program: its time in nanoseconds of the Unix clock, its kind, the module's name, and whether the
module is the output layer.

The kind is ``enter`` or ``leave`` for a module, ``backward``, ``optimizer``, or ``end`` for the end of either of the
last two. It is a plain tuple, because a training step makes thousands of them.
"""


class Label(NamedTuple):
    """What a tensor's block is used for at one time."""

    time_ns: int
    """Nanoseconds of the Unix clock."""
    device: int
    """Index of the device that holds the block."""
    address: int
    """The block's address on the device."""
    category: Category
    module: str
    """Name of the module that the tensor belongs to; ``""`` if it is unknown."""


_Doing = tuple[str, str, bool]
"""A step without its time: kind, module, and whether the module is the output layer."""
_Mark = _Doing | None
"""What to record when a module is called; ``None`` if its allocations count as those of the module around it."""
_LEAVE: _Doing = ("leave", "", False)


@dataclass(slots=True)
class Marks:
    """All recorded events and labels, in the order of time."""

    steps: list[Step] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


class Notes:
    """Records module calls, backward passes and optimizer steps between ``start`` and ``stop``.

    Args:
        address: returns the device and address under which the history records a tensor's memory, or ``None`` if the
            history does not record it.
    """

    def __init__(self, address: Callable[[Tensor], tuple[int, int] | None] | None = None) -> None:
        # Times and events are in separate lists: an event creates no object that the garbage collector has to visit.
        self._times: list[int] = []
        self._doing: list[_Doing] = []
        self._labels: list[Label] = []
        self._address = address or on_card
        # By id of the module. The reference tells whether the module still exists, because Python reuses ids.
        self._known: dict[int, tuple[_Mark, weakref.ref[nn.Module]]] = {}
        self._trainable: list[tuple[weakref.ref[Any], str]] = []
        self._states: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._originals: dict[str, Callable[..., Any]] = {}
        self._on = False

    @property
    def marks(self) -> Marks:
        """All that was recorded so far."""
        steps = [(time, *doing) for time, doing in zip(self._times, self._doing, strict=True)]
        return Marks(steps=steps, labels=self._labels)

    def start(self) -> None:
        """Start to record."""
        import torch
        from torch.optim import optimizer as optimizers

        self._on = True
        self._handles = [
            optimizers.register_optimizer_step_pre_hook(self._before_step),
            optimizers.register_optimizer_step_post_hook(self._after_step),
        ]
        for name in ("backward", "grad"):
            self._originals[name] = getattr(torch.autograd, name)
            setattr(torch.autograd, name, self._around_backward(self._originals[name]))
        self._originals["call"] = torch.nn.Module.__call__
        self._around = torch.nn.Module.__call__ = self._around_call(torch.nn.Module.__call__)  # type: ignore[method-assign]  # a patch, which stop() takes back

    def stop(self) -> None:
        """Stop recording. What was recorded stays."""
        import torch

        self._on = False  # if another library has wrapped this patch, it stays in place and only passes calls on
        for handle in self._handles:
            handle.remove()
        call = self._originals.pop("call", None)
        if call is not None and torch.nn.Module.__call__ is self._around:
            torch.nn.Module.__call__ = call  # type: ignore[method-assign]  # a patch, which stop() takes back
        for name, original in self._originals.items():
            setattr(torch.autograd, name, original)
        self._handles, self._originals = [], {}

    def _around_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the replacement for ``nn.Module.__call__``. It runs thousands of times per step, so it does little.

        Global forward hooks would cost three times as much, because with them torch leaves the fast path of every call.
        """
        from torch.compiler import is_dynamo_compiling

        known, tick, note, depth = self._known, self._times.append, self._doing.append, 0

        @wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if is_dynamo_compiling() or not self._on:
                return original(module, *args, **kwargs)
            found = known.get(id(module))
            if found is None or found[1]() is not module:
                self.meet(module)
                found = known[id(module)]
            mark = found[0]
            if mark is None and depth:
                return original(module, *args, **kwargs)
            depth += 1
            tick(time_ns())
            note(mark or self._own(module))
            try:
                return original(module, *args, **kwargs)
            finally:  # activation checkpointing ends the recomputation of a layer with an exception
                depth -= 1
                tick(time_ns())
                note(_LEAVE)

        return call

    def meet(self, module: nn.Module) -> None:
        """Register a new module and its submodules, and label their tensors.

        This happens at each module's first call. A caller that needs the labels earlier, or whose program reads a
        weight without a call of its module, calls this method itself.
        """
        import torch

        # A parameter that overrides __torch_function__, such as a 4-bit one, would run its code to give its address.
        with torch_private.plain_tensors():
            parameters, buffers, constants = self._walk(module)
            frozen = any(not parameter.requires_grad for parameter, _, _ in parameters)
            now = time_ns()
            for parameter, name, adapter in parameters:
                trained = parameter.requires_grad
                kind: Category = "adapters" if adapter or (frozen and trained) else "weights"
                self._label(now, parameter, kind, name)
                if trained:
                    self._trainable.append((weakref.ref(parameter), name))
                    if parameter.is_leaf:  # a parametrization replaces a parameter by a computed tensor
                        note = partial(self._label_gradient, name)
                        self._handles.append(parameter.register_post_accumulate_grad_hook(note))
                if type(parameter) is not torch.nn.Parameter:
                    for constant in quantization_constants(parameter):
                        self._label(now, constant, "quantization", name)
            for constant, name in constants:
                self._label(now, constant, "quantization", name)
            for buffer, name in buffers:
                self._label(now, buffer, "weights", name)

    def _walk(
        self, module: nn.Module
    ) -> tuple[list[tuple[Any, str, bool]], list[tuple[Tensor, str]], list[tuple[Tensor, str]]]:
        """Register a module and its submodules.

        Inside a part of a layer, such as its attention, submodules get no names of their own: a 7B model with adapters
        has thousands of them, and no report shows them.

        Returns:
            The parameters, each with its module's name and whether it belongs to an adapter; the buffers, each with its
            module's name; and the quantization constants that modules keep themselves, each with the module's name.
        """
        parameters: list[tuple[Any, str, bool]] = []
        buffers: list[tuple[Tensor, str]] = []
        constants: list[tuple[Tensor, str]] = []
        known, head, adapts = self._known, _output_layer(module), _Adapters()
        known[id(module)] = (("enter", type(module).__name__, False), weakref.ref(module))
        seen = {id(module)}
        # Module, name, group, whether all submodules are in the same group, whether it belongs to an adapter.
        todo = [(module, "", "", False, False)]
        while todo:
            parent, name, group, closed, adapter = todo.pop()
            for key, parameter in parent._parameters.items():
                if parameter is not None:
                    parameters.append((parameter, name, adapter or adapts[key]))
            buffers += [(buffer, name) for buffer in parent._buffers.values() if buffer is not None]
            constants += [(constant, name) for constant in _module_constants(parent)]
            for key, child in parent._modules.items():
                if child is None or id(child) in seen:
                    continue
                seen.add(id(child))
                is_head = child is head or key in _HEADS
                if closed and not is_head:
                    known[id(child)] = (None, weakref.ref(child))
                    todo.append((child, name, group, True, adapter or adapts[key]))
                    continue
                path = f"{name}.{key}" if name else key
                own = module_group(path)
                mark = ("enter", path, is_head) if is_head or own != group else None
                known[id(child)] = (mark, weakref.ref(child))
                todo.append((child, path, own, own.rpartition(".")[0].endswith("*"), adapter or adapts[key]))
        return parameters, buffers, constants

    def _own(self, module: nn.Module) -> _Doing:
        """Return the event of a module that the program calls directly, without its parent."""
        mark = ("enter", type(module).__name__, False)
        self._known[id(module)] = (mark, weakref.ref(module))
        return mark

    def _around_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            self._note("backward")
            try:
                return original(*args, **kwargs)
            finally:
                self._label_gradients()
                self._note("end")

        return backward

    def _label_gradient(self, module: str, parameter: Tensor) -> None:
        """Label a gradient when it is complete: the program may move or free it before the backward pass ends."""
        if self._on and parameter.grad is not None:
            with torch_private.plain_tensors():
                self._label(time_ns(), parameter.grad, "gradients", module)

    def _label_gradients(self) -> None:
        now = time_ns()
        with torch_private.plain_tensors():
            self._label_each_gradient(now)

    def _label_each_gradient(self, now: int) -> None:
        address, append = self._address, self._labels.append
        for reference, module in self._trainable:
            parameter = reference()
            # Read once, because each access to ``grad`` creates an object.
            gradient = None if parameter is None else parameter.grad
            if gradient is not None and (place := address(gradient)) is not None:
                append(Label(now, *place, "gradients", module))

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._note("optimizer")

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        now = time_ns()
        self._note("end")
        if self._states.get(optimizer) != len(optimizer.state):  # the optimizer creates its state in the first step
            self._states[optimizer] = len(optimizer.state)
            for state in optimizer.state.values():
                for tensor in _tensors(state):
                    self._label(now, tensor, "optimizer")

    def _label(self, now: int, tensor: Tensor, category: Category, module: str = "") -> None:
        place = self._address(tensor)
        if place is not None:
            self._labels.append(Label(now, *place, category, module))

    def _note(self, kind: str) -> None:
        self._times.append(time_ns())
        self._doing.append((kind, "", False))


class _Adapters(dict[str, bool]):
    """A cache that tells whether a part of a module's name belongs to an adapter; each part is matched once."""

    def __missing__(self, key: str) -> bool:
        self[key] = found = bool(_ADAPTERS.search(key))
        return found


def _on_this_rank(tensor: Tensor) -> Tensor:
    """Return the tensor that has the memory: for a sharded one (DTensor), its part on this rank."""
    import torch

    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def on_card(tensor: Tensor) -> tuple[int, int] | None:
    """Return the device and address of the block of a CUDA tensor; None for other tensors.

    Of a sharded tensor (DTensor) it is the block of the part on this rank.
    """
    tensor = _on_this_rank(tensor)
    device = tensor.get_device()
    if device < 0 or not tensor.is_cuda:
        return None
    # Reading the storage creates an object. A tensor without an offset has the same address as its storage.
    whole = tensor.storage_offset() == 0
    return device, tensor.data_ptr() if whole else tensor.untyped_storage().data_ptr()


def module_group(name: str) -> str:
    """Return the group of a module: ``model.layers.*.self_attn`` for ``model.layers.3.self_attn.q_proj``."""
    parts = ["*" if part.isdigit() else part for part in _WRAPPERS.sub("", name).split(".")]
    if parts[0] == "*":  # a model whose submodules are numbered, such as a Sequential
        return "model[*]"
    end = parts.index("*") + 2 if "*" in parts else 2
    return ".".join(parts[:end])


def _output_layer(module: nn.Module) -> Any:
    find = getattr(module, "get_output_embeddings", None)
    try:
        return find() if callable(find) else None
    except (AttributeError, NotImplementedError):
        return None


def _module_constants(module: nn.Module) -> Iterator[Tensor]:
    """Yield the quantization constants that a module itself keeps.

    An 8-bit layer keeps them from its first use on. A mixture of experts in 4 bits keeps the states of its experts in
    the attribute ``quant_states``, which maps the name of each parameter to a list of states.
    """
    kept = vars(module)
    yield from quantization_constants(kept.get("state"))
    states = kept.get("quant_states")
    if isinstance(states, Mapping):
        for experts in states.values():
            for state in experts if isinstance(experts, (list, tuple)) else (experts,):
                yield from quantization_constants(state)


def _tensors(state: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
