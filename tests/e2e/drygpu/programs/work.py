"""What a dry GPU counts of kernels, copies and waits, where the number is known from what the program asks for."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from checks import Checks

from pytest_vram.drygpu import driver

if TYPE_CHECKING:
    from collections.abc import Callable

check = Checks()
SIZE = 1 << 20
on_card = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
pageable = torch.empty(SIZE, dtype=torch.uint8)
pinned = torch.empty(SIZE, dtype=torch.uint8, pin_memory=True)
a = torch.randn(64, 64, device="cuda")
half = a.to(torch.bfloat16)
bias = torch.randn(64, device="cuda")
a @ a, half @ half, torch.nn.functional.linear(half, half, bias.to(torch.bfloat16))  # handles and workspaces
runtime: Any = ctypes.CDLL(None)


def counted(*actions: Callable[[], Any]) -> list[dict[str, int]]:
    """What each action adds, figures of 0 left out."""
    found = []
    for action in actions:
        before = driver.work()
        action()
        added = driver.work() - before
        names = type(added).__dataclass_fields__
        found.append({name: value for name in names if (value := getattr(added, name))})
    return found


@check
def kernels() -> Any:
    bias16 = bias.to(torch.bfloat16)
    return counted(
        lambda: None,
        lambda: a.add_(1),
        lambda: torch.matmul(a, a),
        lambda: torch.matmul(half, half),
        lambda: torch.nn.functional.linear(half, half, bias16),
        lambda: torch._foreach_add_([a, a.clone()], 1.0),
    )


@check
def copies() -> Any:
    return counted(
        lambda: on_card.copy_(pageable),
        lambda: on_card.copy_(pinned),
        lambda: on_card.copy_(pinned, non_blocking=True),
        lambda: on_card.copy_(pageable, non_blocking=True),
        lambda: pageable.copy_(on_card),
        lambda: pinned.copy_(on_card),
        lambda: pinned.copy_(on_card, non_blocking=True),
        lambda: on_card.clone(),
        lambda: on_card[0].item(),
    )


@check
def raw_copies() -> Any:
    def rows(wait: bool) -> None:
        arguments = [ctypes.c_void_p(on_card.data_ptr()), 1024, ctypes.c_void_p(pinned.data_ptr()), 512, 256, 10, 1]
        sized = [ctypes.c_size_t(x) if isinstance(x, int) else x for x in arguments[:6]]
        function = runtime.cudaMemcpy2D if wait else runtime.cudaMemcpy2DAsync
        assert function(*sized, ctypes.c_int(1), *([] if wait else [None])) == 0

    def plain(target: torch.Tensor, source: torch.Tensor, kind: int) -> None:
        addresses = ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
        assert runtime.cudaMemcpy(*addresses, ctypes.c_size_t(100), ctypes.c_int(kind)) == 0

    return counted(
        lambda: rows(False),
        lambda: rows(True),
        lambda: plain(on_card, pageable, 4),
        lambda: plain(pageable, on_card, 4),
        lambda: plain(on_card, on_card[1000:], 4),
        lambda: plain(pageable, pinned, 4),
    )


@check
def waits() -> Any:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()

    def recorded() -> None:
        event.record(stream)
        event.synchronize()

    def ordered() -> None:
        torch.cuda.current_stream().wait_stream(stream)

    def copied_then_waited() -> None:
        pageable.copy_(on_card)
        torch.cuda.synchronize()

    return counted(
        torch.cuda.synchronize,
        stream.synchronize,
        recorded,
        torch.cuda.Event().synchronize,
        event.query,
        ordered,
        copied_then_waited,
    )


@check
def graphs() -> Any:
    x = torch.zeros(SIZE, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)
    graph = torch.cuda.CUDAGraph()

    def captured() -> None:
        with torch.cuda.graph(graph):
            x.add_(1)
            x.mul_(2)
            y = torch.empty_like(x)
            y.copy_(x)

    captured()
    return counted(graph.replay, lambda: [graph.replay() for _ in range(3)])


check.run()
