"""What the program was doing, with the time of it: module calls, backward passes, optimizer steps, and whose tensors
are whose.

Kept beside torch's memory history, whose entries carry times of the same clock, this tells what each allocation is for.
Costs nothing while it is off.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from time import time_ns
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from pytest_vram.memory.timeline import Category

_HEADS = ("lm_head", "embed_out", "score")
_ADAPTERS = ("lora_", "adapter", "ia3_", "prompt_encoder", "modules_to_save")


Step = tuple[int, str, str, bool]
"""From a time on the program does something else: nanoseconds of the Unix clock, kind, module, is it the head.

The kind is ``enter`` or ``leave`` (a module), ``backward``, ``optimizer`` or ``end`` (of either of them). A plain
tuple, because a training step makes thousands.
"""


class Label(NamedTuple):
    """The block at ``address`` of device ``device`` is a ``category`` of ``module``, as seen at ``time_ns``."""

    time_ns: int
    device: int
    address: int
    category: Category
    module: str = ""


@dataclass(slots=True)
class Marks:
    """All that was noted, in order of time."""

    steps: list[Step] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


class Notes:
    """Takes marks between ``start`` and ``stop``, through torch's global module and optimizer hooks."""

    def __init__(self) -> None:
        self.marks = Marks()
        self._names: dict[int, tuple[str, bool]] = {}
        self._trainable: list[tuple[weakref.ref[Any], str]] = []
        self._states: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._originals: dict[str, Callable[..., Any]] = {}

    def start(self) -> None:
        """Register the hooks."""
        import torch
        from torch.nn.modules import module as modules
        from torch.optim import optimizer as optimizers

        enter, leave = self._hooks()
        self._handles = [
            modules.register_module_forward_pre_hook(enter),
            # always_call: checkpointing leaves a recomputed layer by an exception.
            modules.register_module_forward_hook(leave, always_call=True),
            optimizers.register_optimizer_step_pre_hook(self._before_step),
            optimizers.register_optimizer_step_post_hook(self._after_step),
        ]
        for name in ("backward", "grad"):
            self._originals[name] = getattr(torch.autograd, name)
            setattr(torch.autograd, name, self._around_backward(self._originals[name]))

    def stop(self) -> None:
        """Remove the hooks. What was noted stays."""
        import torch

        for handle in self._handles:
            handle.remove()
        for name, original in self._originals.items():
            setattr(torch.autograd, name, original)
        self._handles, self._originals = [], {}

    def _hooks(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """What is called before and after each module's forward: thousands of times a step, so in few instructions."""
        find, append = self._names.get, self.marks.steps.append

        def enter(module: nn.Module, inputs: Any) -> None:
            known = find(id(module))
            if known is None:
                self._meet(module)
                known = self._names[id(module)]
            append((time_ns(), "enter", known[0], known[1]))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            append((time_ns(), "leave", "", False))

        return enter, leave

    def _meet(self, module: nn.Module) -> None:
        """A module that is new here: remember the names below it, and whose its tensors are."""
        head = _output_layer(module)
        for name, child in module.named_modules():
            last = name.rpartition(".")[2]
            self._names[id(child)] = (name or type(module).__name__, child is head or last in _HEADS)
            weakref.finalize(child, self._names.pop, id(child), None).atexit = False  # an id may be given again
        parameters = list(module.named_parameters())
        frozen = any(not parameter.requires_grad for _, parameter in parameters)
        now = time_ns()
        for name, parameter in parameters:
            adapter = any(part in name for part in _ADAPTERS) or (frozen and parameter.requires_grad)
            self._label(now, parameter, "adapters" if adapter else "weights", name.rpartition(".")[0])
            if parameter.requires_grad:
                self._trainable.append((weakref.ref(parameter), name.rpartition(".")[0]))
            for constant in _quantization_constants(parameter):
                self._label(now, constant, "quantization", name.rpartition(".")[0])
        for name, buffer in module.named_buffers():
            self._label(now, buffer, "weights", name.rpartition(".")[0])

    def _around_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            self.marks.steps.append((time_ns(), "backward", "", False))
            try:
                return original(*args, **kwargs)
            finally:
                self._label_gradients()
                self.marks.steps.append((time_ns(), "end", "", False))

        return backward

    def _label_gradients(self) -> None:
        now = time_ns()
        for reference, module in self._trainable:
            parameter = reference()
            if parameter is not None and parameter.grad is not None:
                self._label(now, parameter.grad, "gradients", module)

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.marks.steps.append((time_ns(), "optimizer", "", False))

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        now = time_ns()
        self.marks.steps.append((now, "end", "", False))
        if self._states.get(optimizer) != len(optimizer.state):  # its state is made once, in the first step
            self._states[optimizer] = len(optimizer.state)
            for state in optimizer.state.values():
                for tensor in _tensors(state):
                    self._label(now, tensor, "optimizer")

    def _label(self, now: int, tensor: Tensor, category: Category, module: str = "") -> None:
        if tensor.is_cuda:
            address = tensor.untyped_storage().data_ptr()
            self.marks.labels.append(Label(now, tensor.get_device(), address, category, module))


def _output_layer(module: nn.Module) -> Any:
    find = getattr(module, "get_output_embeddings", None)
    try:
        return find() if callable(find) else None
    except (AttributeError, NotImplementedError):
        return None


def _quantization_constants(parameter: Any) -> Iterator[Tensor]:
    """Scales and code books that bitsandbytes keeps beside a 4-bit or 8-bit weight."""
    import torch

    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for name in ("absmax", "code", "offset"):
            tensor = getattr(state, name, None)
            if isinstance(tensor, torch.Tensor):
                yield tensor
        state = getattr(state, "state2", None)
    scales = getattr(parameter, "SCB", None)
    if isinstance(scales, torch.Tensor):
        yield scales


def _tensors(state: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
