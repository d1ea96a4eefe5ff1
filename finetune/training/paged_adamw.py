"""Implements ``paged-adamw``: AdamW with fp32 moments in managed memory, and one update for a card's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch

from finetune.kernels.available import kernel_runs_on
from finetune.training.adamw import Coefficients, Updated, update_in_torch
from finetune.training.masters import DROPPED, keep_masters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

_SMALL = 16
"""Elements of the tensors with which the kernel is compiled: as the sizes of most parameters, a multiple of 16."""


class PagedAdamW(bnb.optim.PagedAdamW32bit):  # type: ignore[misc]  # bitsandbytes has no annotations
    """AdamW (https://arxiv.org/abs/1711.05101) whose states the driver moves to the host when the card is full.

    bitsandbytes' own step updates one parameter at a time and waits for the card after each. The step of this class
    updates all parameters on a card at once (:mod:`finetune.training.adamw`) and does not wait, so code that reads the
    states has to wait for the stream first. On a CPU the states are ordinary tensors, and bitsandbytes updates them.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, masters: bool, kernel: bool, paged_from: int, **settings: Any
    ) -> None:
        """Take ``settings`` as bitsandbytes does (``lr``, ``betas``, ``eps``, ``weight_decay``).

        Args:
            parameters: the parameters to train, in fp32, bf16 or fp16.
            masters: update exact fp32 masters of bf16 parameters, which takes 2 bytes more for each element.
            kernel: use the Triton kernel on devices where it runs. Otherwise, a few operators update each parameter.
            paged_from: the states of parameters with this many elements or more are paged.
        """
        super().__init__(parameters, **settings)
        self.kernel, self.paged_from, self._masters = kernel, paged_from, masters
        if masters:
            keep_masters(self)

    def get_state_buffer(self, p: nn.Parameter, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros of the parameter's shape, in managed memory if the parameter is on a card and large enough."""
        if p.device.type != "cuda":
            return super().get_state_buffer(p, dtype=dtype)  # type: ignore[no-any-return]  # no annotations
        if p.numel() < self.paged_from:
            return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        buffer = _on_card(bnb_functional.get_paged(*p.shape, dtype=dtype, device=p.device), p.device)
        self.page_mng.paged_tensors.append(buffer)
        return buffer.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kept = [group["params"] for group in self.param_groups]
        try:
            for number, group in enumerate(self.param_groups):
                self._update(group, number)
                group["params"] = [p for p in group["params"] if not _is_ours(p)]
            super().step()
        finally:
            for group, parameters in zip(self.param_groups, kept, strict=True):
                group["params"] = parameters
        return loss

    @torch.no_grad()
    def compile_kernel(self) -> None:
        """Compile the kernel for the parameters that are on a card, before the first step. No value changes."""
        for group in self.param_groups:
            kinds: dict[tuple[torch.device, torch.dtype], int] = {}
            for parameter in group["params"]:
                if self.kernel and parameter.numel() and _is_ours(parameter) and kernel_runs_on(parameter.device):
                    kind = (parameter.device, parameter.dtype)
                    kinds[kind] = kinds.get(kind, 0) + 1
            for (device, dtype), count in kinds.items():
                weight = torch.zeros(_SMALL, dtype=dtype, device=device)
                moment = torch.zeros(_SMALL, device=device)
                masters = self._masters and dtype == torch.bfloat16
                dropped = torch.zeros(_SMALL, dtype=torch.int16, device=device) if masters else None
                stand_in = Updated(
                    weight=weight, gradient=torch.zeros_like(weight), first=moment, second=moment, dropped=dropped
                )
                update([stand_in] * count, self._numbers(group, 1), kernel=True)

    def _numbers(self, group: dict[str, Any], step: int) -> Coefficients:
        return Coefficients.of(
            lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], step=step
        )

    def _update(self, group: dict[str, Any], number: int) -> None:
        due: dict[tuple[int, torch.device], list[Updated]] = {}
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None or not _is_ours(parameter):
                continue
            state = self.state[parameter]
            if not state:
                self.init_state(group, parameter, number, index)
            state["step"] += 1
            parameter.data = parameter.data.contiguous()
            found = Updated(
                weight=parameter.data,
                gradient=parameter.grad.contiguous(),
                first=state["state1"],
                second=state["state2"],
                dropped=state.get(DROPPED),
            )
            due.setdefault((state["step"], parameter.device), []).append(found)
        for (step, device), parameters in due.items():
            update(parameters, self._numbers(group, step), kernel=self.kernel and kernel_runs_on(device))


def update(parameters: Sequence[Updated], numbers: Coefficients, *, kernel: bool) -> None:
    """Update all ``parameters`` in place: with ``kernel`` in one launch for each dtype, else with torch's operators."""
    if kernel:
        from finetune.training.adamw_kernel import update_in_one_launch

        update_in_one_launch(parameters, numbers)
    else:
        for parameter in parameters:
            update_in_torch(parameter, numbers)


def _is_ours(parameter: nn.Parameter) -> bool:
    """Return whether this module updates the parameter: on a card, or on a CPU with Triton's interpreter."""
    return parameter.device.type != "cpu" or kernel_runs_on(parameter.device)


class _Managed:
    """Managed memory, described to PyTorch as memory of a card."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # keeps it alive
        self.__cuda_array_interface__ = {
            "data": (buffer.data_ptr(), False),
            "shape": tuple(buffer.shape),
            "typestr": {torch.float32: "<f4", torch.int16: "<i2"}[buffer.dtype],
            "version": 3,
        }


def _on_card(buffer: Tensor, device: torch.device) -> Tensor:
    """Return a paged tensor of bitsandbytes as a tensor of the card.

    bitsandbytes makes it a tensor of the host, but kernels on the card can read and write its memory as well.
    """
    found: Any = torch.as_tensor(_Managed(buffer), device=device)
    found.is_paged, found.page_deviceid = True, device.index
    return found  # type: ignore[no-any-return]  # `found` is Any
