"""When streams have come past what they were given: events, and the blocks that wait for them."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from checks import Checks

check = Checks()
MIB = 1 << 20
side = torch.cuda.Stream()
pinned = torch.empty(64 * MIB, dtype=torch.uint8).pin_memory()
on_card = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
small = torch.zeros(64, device="cuda")


def copy_aside(size: int = 64 * MIB) -> torch.cuda.Event:
    """Copy to the card on another stream, and return an event behind the copy."""
    with torch.cuda.stream(side):
        on_card[:size].copy_(pinned[:size], non_blocking=True)
    return side.record_event()


def launch(count: int) -> None:
    for _ in range(count):
        small.add_(1)


@check
def an_event_is_complete_when_the_host_waited_for_it() -> Any:
    event = copy_aside()
    before = [event.query(), side.query()]
    event.synchronize()
    return [*before, event.query(), side.query()]


@check
def other_waits_pass_it_too() -> Any:
    answers = []
    for wait in (side.synchronize, torch.cuda.synchronize, small.sum().item):
        event = copy_aside()
        torch.cuda.current_stream().wait_stream(side)
        before = event.query()
        wait()
        answers.append([before, event.query()])
    return answers


@check
def a_wait_for_another_stream_does_not_pass_it() -> Any:
    event = copy_aside()
    torch.cuda.current_stream().synchronize()
    before = event.query()
    torch.cuda.current_stream().wait_event(event)
    behind = torch.cuda.current_stream().record_event()
    return [before, behind.query(), (behind.synchronize(), event.query())[1]]


@check
def the_host_is_slower_than_a_small_copy() -> Any:
    event = copy_aside(4096)
    launch(20)
    return event.query()


@check
def a_full_launch_queue_waits() -> Any:
    torch.cuda.synchronize()
    for _ in range(8):
        event = copy_aside()
    with torch.cuda.stream(side):
        launch(1000)
        before = event.query()
        launch(100)
    return [before, event.query()]


@check
def who_polls_sees_the_end() -> Any:
    event, polls = copy_aside(), 0
    while not event.query():
        polls += 1
    return 0 < polls < 40


@check
def a_thread_that_gives_no_work_sees_everything_complete() -> Any:
    event, seen = copy_aside(), []
    watcher = threading.Thread(target=lambda: seen.append(event.query()))
    watcher.start()
    watcher.join()
    return [*seen, event.query()]


@check
def large_work_takes_longer() -> Any:
    """Products by their operations, kernels by their threads, copies and fills on the card by their bytes."""

    def takes_long(*work: Any) -> list[bool]:
        answers = []
        for task in work:
            torch.cuda.synchronize()
            task()
            event = torch.cuda.current_stream().record_event()
            launch(5)
            answers.append(not event.query())
        return answers

    large, little = (torch.empty(size, size, device="cuda", dtype=torch.bfloat16) for size in (4096, 32))
    bias = torch.empty(4096, device="cuda", dtype=torch.bfloat16)
    batch = torch.empty(64, 1024, 1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(large, large)
    return takes_long(
        lambda: torch.mm(large, large),
        lambda: torch.addmm(bias, large, large),
        lambda: torch.bmm(batch, batch),
        lambda: batch.add_(1),
        lambda: batch.clone(),
        lambda: batch.zero_(),
        graph.replay,
    ) + takes_long(
        lambda: torch.mm(little, little), lambda: torch.addmm(bias[:32], little, little), lambda: little.add_(1)
    )


@check
def a_shared_block_is_reused_when_the_other_stream_has_come_past_it() -> Any:
    def reserved(wait: Any, size: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        start = torch.cuda.memory_reserved()
        for _ in range(3):
            block = torch.empty(size, dtype=torch.uint8, device="cuda")
            with torch.cuda.stream(side):
                block.copy_(pinned[:size], non_blocking=True)
            block.record_stream(side)
            del block
            wait()
        return (torch.cuda.memory_reserved() - start) // size

    return [
        reserved(lambda: None, 64 * MIB),
        reserved(side.synchronize, 64 * MIB),
        reserved(lambda: launch(5000), 64 * MIB),
    ]


@check
def pinned_memory_is_reused_when_the_copy_is_done() -> Any:
    def addresses(wait: Any) -> int:
        torch.cuda.synchronize()
        found = set()
        for _ in range(3):
            host = torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True)
            found.add(host.data_ptr())
            on_card[: 32 * MIB].copy_(host, non_blocking=True)
            del host
            wait()
        return len(found)

    return [addresses(torch.cuda.synchronize), addresses(lambda: None)]


@check
def collectives_take_what_their_bytes_need() -> Any:
    """Of two ranks, of which this is one: what is freed behind a collective is pending until the host waits."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=2)
    answers = []
    for collective in (
        lambda: dist.all_reduce(on_card, async_op=True),
        lambda: dist.broadcast(on_card, 0, async_op=True),
        lambda: dist.all_gather_into_tensor(on_card, on_card[: 32 * MIB], async_op=True),
        lambda: dist.reduce_scatter_tensor(on_card[: 32 * MIB], on_card, async_op=True),
    ):
        torch.cuda.synchronize()
        collective().wait()
        event = torch.cuda.current_stream().record_event()
        before = event.query()
        torch.cuda.synchronize()
        answers.append([before, event.query()])
    return answers


check.run()
