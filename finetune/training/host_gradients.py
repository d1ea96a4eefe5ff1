"""Keeps earlier gradients in host memory, so that a window needs no more of the card than a single micro-batch.

The gradients so far are not needed until the next micro-batch's backward pass is over. The peak of a window comes
before that, while the inputs of all layers are in memory. An adapter's gradients, 80 MiB for a 7B model at rank 16,
cross the bus twice for each micro-batch. They are copied in a few large pieces from and to flat pinned memory, on a
stream of their own, during the next forward pass.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from finetune.config.settings import TrainConfig

ON_CARD = "finetune_gradients_on_card"
"""Attribute of a model for whose gradients the card has room, so that they need not wait on the host."""
CHUNK_BYTES = 8 * 2**20
"""Bytes that are gathered on the card for one copy. A window needs them in addition, when the activations are gone."""


def wanted(model: nn.Module, config: TrainConfig) -> bool:
    """Return whether earlier gradients go to the host. Those of an adapter do, on a card with a paged optimizer.

    The gradients of all weights do not, because they would be gigabytes for each micro-batch. Those of a model with the
    attribute :data:`ON_CARD` stay where they are.
    """
    if getattr(model, ON_CARD, False):
        return False
    device = next(model.parameters()).device
    return device.type != "cpu" and isinstance(model, PeftModel) and config.optimizer.startswith("paged")


def put_away(parameters: Iterable[nn.Parameter], earlier: dict[nn.Parameter, Tensor]) -> None:
    """Add each ``.grad`` to its parameter's sum in ``earlier``, in host memory, and set ``.grad`` to None.

    The sums equal, bit for bit, those that ``.grad`` itself would have had. The function does not wait for the card, so
    the bytes on the host are valid only after the caller has waited for it.

    Args:
        parameters: the trained parameters, in the same order each time.
        earlier: the sums, which are views of flat tensors; empty before the first call.
    """
    fresh = []
    again: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter in earlier:
            again.setdefault(_flat(earlier[parameter]).data_ptr(), []).append(parameter)
        else:
            fresh.append(parameter)
    for chunk in again.values():
        host = _flat(earlier[chunk[0]])
        total = _to_device(host, chunk[0].device)
        _add([_part(total, earlier[p]) for p in chunk], _taken(chunk))
        _to_host(total, host)
    for chunk in _chunks(fresh):
        sizes = [parameter.numel() for parameter in chunk]
        total = torch.cat([gradient.flatten() for gradient in _taken(chunk)])
        host = torch.empty_like(total, device="cpu", pin_memory=total.is_cuda)
        _to_host(total, host)
        for parameter, part in zip(chunk, host.split(sizes), strict=True):
            earlier[parameter] = part.view(parameter.shape)


def bring_back(earlier: dict[nn.Parameter, Tensor]) -> None:
    """Put the sum of ``earlier`` and ``.grad`` into ``.grad``, and empty ``earlier``."""
    chunks: dict[int, list[nn.Parameter]] = {}
    for parameter, kept in earlier.items():
        chunks.setdefault(_flat(kept).data_ptr(), []).append(parameter)
    for chunk in chunks.values():
        total = _to_device(_flat(earlier[chunk[0]]), chunk[0].device)
        parts = {parameter: _part(total, earlier.pop(parameter)) for parameter in chunk}
        both = [parameter for parameter in chunk if parameter.grad is not None]
        _add([p.grad for p in both if p.grad is not None], [parts[p] for p in both])
        for parameter in chunk:
            if parameter.grad is None:
                parameter.grad = parts[parameter].clone()  # a view would keep the whole chunk


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one dtype on one device with gradients of :data:`CHUNK_BYTES` at most, or one larger one."""
    chunk: list[nn.Parameter] = []
    size = 0
    for parameter in sorted(parameters, key=lambda p: (str(p.dtype), str(p.device))):  # a stable sort
        other = chunk and (chunk[0].dtype, chunk[0].device) != (parameter.dtype, parameter.device)
        if chunk and (other or size + parameter.nbytes > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.nbytes
    if chunk:
        yield chunk


def _taken(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Take the gradients from their parameters, and return them."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            parameter.grad = None
    return gradients


def _add(targets: list[Tensor], others: list[Tensor]) -> None:
    if targets:
        torch._foreach_add_(targets, others)


def _flat(part: Tensor) -> Tensor:
    """Return the flat tensor in host memory of which ``part`` is a view."""
    base: Tensor | None = part._base
    return part if base is None else base


def _part(total: Tensor, of: Tensor) -> Tensor:
    """Return the view of ``total``, on the device, that corresponds to the view ``of`` of its copy in host memory."""
    begin = of.storage_offset()
    return total[begin : begin + of.numel()].view(of.shape)


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to_host(total: Tensor, host: Tensor) -> None:
    """Copy to the host, while the current stream goes on with its next work."""
    if not total.is_cuda:
        host.copy_(total)
        return
    stream = _own_stream(total.device)
    stream.wait_stream(torch.cuda.current_stream(total.device))
    with torch.cuda.stream(stream):
        host.copy_(total, non_blocking=True)
    total.record_stream(stream)  # its memory is not reused before the copy is done


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, after all copies to the host are done. The current stream waits for the copy."""
    if device.type != "cuda":
        return host.to(device, copy=True)
    total = torch.empty_like(host, device=device)
    stream, current = _own_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)  # the work that used this memory before may not be done
    with torch.cuda.stream(stream):
        total.copy_(host, non_blocking=True)
    current.wait_stream(stream)
    return total
