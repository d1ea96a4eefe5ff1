"""Keeps the inputs of recomputed layers in host memory until the backward pass needs them.

A layer that recomputes its activations keeps nothing but its input. The inputs of all layers together are the largest
part of what a step with long rows holds. Here an input is copied to the host while its layer computes, and back to the
card while the layer after it, which the backward pass reaches first, recomputes and goes backward. So the card holds
two inputs at most, and the step does not wait unless a copy takes longer than a layer.

Copies run on a stream of their own (:mod:`finetune.model.host_copies`). Events order them with the step's work:

* An input stays on the card until the next layer begins, and the step's stream waits there for its copy. So no memory
  is handed on while it is still read, and the allocator's figures do not depend on when a copy is done.
* The memory into which an input comes back is the step's own, so the copy waits for the work so far, and the layer that
  needs it waits for the copy.
* A host buffer belongs to one input until autograd has dropped that. All copies run in the order in which they were
  started, so the next input that gets the buffer is not written into it before the earlier one is read.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from finetune.disk.run_log import notice
from finetune.errors import ModelError
from finetune.model.forward import base_model, decoder_of
from finetune.model.host_copies import Copies, copies_of
from finetune.model.recompute import layers_of
from finetune.patches.transformers import checkpointed_through
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

_stores: dict[torch.device, Store] = {}


@contextlib.contextmanager
def keeping_inputs_on_host(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Keep the inputs of the layers that recompute in host memory, for the forward passes inside the block.

    The values are the same bits. The input of the last such layer stays on the card, because it is needed first. What a
    layer gets by name, and what several layers share, stays on the card too.

    Args:
        model: in training mode, on one device. Its layers that recompute are chosen already.
        wanted: whether to do anything.
    """
    layers = _recomputing(model) if wanted else []
    if not layers:
        yield
        return
    device = next(model.parameters()).device
    if device not in _stores:
        _stores[device] = Store(copies_of(device))
    with checkpointed_through(layers, Pass(_stores[device], len(layers)).around):
        yield


def release() -> None:
    """Give back the host memory that no input needs, and drop what an interrupted backward pass left on the card."""
    for store in _stores.values():
        store.release()


def _recomputing(model: nn.Module) -> list[nn.Module]:
    """Return the modules that call the function of checkpointing: layers, or whatever checkpoints all layers."""
    base = base_model(model)
    found: list[nn.Module] = list(layers_of(model)) or list((decoder_of(base) or base).modules())
    return [module for module in found if getattr(module, "gradient_checkpointing", False)]


class Kept:
    """One input: on the host, or on the card if ``host`` is None."""

    def __init__(self, store: Store, tensor: Tensor, host: Tensor | None, before: Kept | None) -> None:
        self.store, self.host, self.before = store, host, before
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.on_card = tensor.detach() if host is None else None
        self.version = tensor._version

    def __del__(self) -> None:
        if self.host is not None:
            self.store.take_back(self.host)

    def bytes_on_host(self) -> Tensor:
        """Return the part of the buffer that is used, as a tensor like the input."""
        assert self.host is not None
        size = self.shape.numel() * self.dtype.itemsize
        return self.host[:size].view(self.dtype).view(self.shape)


class Store:
    """The host buffers of one device, and the inputs that are on their way."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._free: dict[int, Tensor] = {}
        self._refused = False
        self._leaving: tuple[Tensor, int, Any] | None = None
        self._coming: dict[Kept, tuple[Tensor, Any]] = {}

    def keep(self, tensor: Tensor, before: Kept | None, *, on_card: bool) -> Kept:
        """Take an input of a layer that is about to run.

        Args:
            tensor: the input.
            before: the input that the backward pass needs after this one.
            on_card: leave it on the card.
        """
        self.settle()
        size = tensor.nbytes
        host = None if on_card or not size or not tensor.is_contiguous() else self._buffer(size)
        kept = Kept(self, tensor, host, before)
        if host is not None:
            own = tensor.detach()
            self._leaving = (own, kept.version, self._copies.start(kept.bytes_on_host(), own))
        return kept

    def fetch(self, kept: Kept) -> None:
        """Start to bring an input back, unless it is on the card or on its way."""
        if kept.on_card is None and kept not in self._coming:
            self.settle()
            tensor = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
            self._coming[kept] = (tensor, self._copies.start(tensor, kept.bytes_on_host()))

    def arrived(self, kept: Kept) -> Tensor:
        """Return an input on its device, for the work that follows."""
        if kept.on_card is not None:
            _require_unchanged(kept.on_card, kept.version)
            return kept.on_card
        self.fetch(kept)
        tensor, mark = self._coming.pop(kept)
        self._copies.wait(mark)
        return tensor

    def settle(self) -> None:
        """Let the work that follows wait for the copy to the host that is under way, and drop the input."""
        if self._leaving is not None:
            tensor, version, mark = self._leaving
            self._leaving = None
            self._copies.wait(mark)
            _require_unchanged(tensor, version)

    def abandon(self) -> None:
        """Drop inputs that a backward pass which was interrupted has not used."""
        self.settle()
        for _, mark in self._coming.values():
            self._copies.wait(mark)  # the memory may be handed on afterwards
        self._coming.clear()

    def take_back(self, host: Tensor) -> None:
        """Take the buffer of an input that nothing refers to any more."""
        self._free[host.data_ptr()] = host

    def release(self) -> None:
        """Give back all buffers that are not in use."""
        self.abandon()
        self._copies.free([self._free.pop(address) for address in list(self._free)])
        self._refused = False

    def _buffer(self, size: int) -> Tensor | None:
        """Return the smallest free buffer that is large enough, or a new one in place of a smaller one.

        Returns:
            None if the host has no memory for it. Then a line has told so, once.
        """
        enough = [(len(buffer), address) for address, buffer in list(self._free.items()) if len(buffer) >= size]
        if enough:
            return self._free.pop(min(enough)[1])
        if self._refused:
            return None
        self._copies.free([self._free.pop(address) for address in list(self._free)[:1]])
        try:
            return self._copies.allocate(size)
        except (RuntimeError, MemoryError) as error:
            self._refused = True
            notice(
                f"the layers' inputs stay on the card (--no-offload-activations): {size / MIB:,.0f} MiB of host memory "
                f"cannot be pinned for one of them: {error}"
            )
            return None


class Pass:
    """One forward pass: the inputs of its layers in the order in which these run."""

    def __init__(self, store: Store, layers: int) -> None:
        store.abandon()
        self._store, self._layers = store, layers
        self._count = 0
        self._latest: Kept | None = None

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function like ``checkpoint`` that keeps the first argument of what it calls on the host."""

        @functools.wraps(checkpoint)
        def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else None
            own = (first.data_ptr(), first.shape) if isinstance(first, torch.Tensor) else None
            # The hooks live as long as what is saved, so they must not hold the input itself. What the layer saves
            # inside is left to `checkpoint`, whose own hooks come before these.
            with saved_tensors_hooks(functools.partial(self._pack, own), self._unpack):
                return checkpoint(function, *args, **kwargs)

        return keeping

    def _pack(self, own: tuple[int, torch.Size] | None, tensor: Tensor) -> Tensor | Kept:
        if (tensor.data_ptr(), tensor.shape) != own:
            return tensor
        self._count += 1
        kept = self._store.keep(tensor, self._latest, on_card=self._count == self._layers)
        self._latest = kept if kept.on_card is None else None  # what is on the card goes with the layer's own graph
        return kept

    def _unpack(self, kept: Tensor | Kept) -> Tensor:
        if not isinstance(kept, Kept):
            return kept
        tensor = self._store.arrived(kept)
        if kept.before is not None:
            self._store.fetch(kept.before)
        return tensor


def _require_unchanged(tensor: Tensor, version: int) -> None:
    """Check that nobody has written to an input since it was kept, as autograd checks what it keeps itself.

    Raises:
        ModelError: it was changed.
    """
    if tensor._version != version:
        raise ModelError(
            "a layer of this model changes its input in place, so that it cannot be recomputed from it: "
            "use --no-checkpointing"
        )
