"""How many bytes of shared blocks a card whose streams lag behind may hold at once."""

from __future__ import annotations

from pytest_vram.drygpu.values.lagging_streams import LAUNCH_QUEUE, Lag


def test_blocks_add_up_until_the_host_waits() -> None:
    lag = Lag()
    lag.add(100, launches=1, waits=0)
    lag.add(50, launches=2, waits=0)
    assert lag.most == 150
    lag.add(120, launches=3, waits=1)
    assert lag.most == 150
    lag.add(40, launches=4, waits=1)
    assert lag.most == 160


def test_a_block_is_free_once_a_full_launch_queue_lies_behind_it() -> None:
    lag = Lag()
    lag.add(100, launches=0, waits=0)
    lag.add(10, launches=LAUNCH_QUEUE, waits=0)
    assert lag.most == 110
    lag.add(30, launches=LAUNCH_QUEUE + 1, waits=0)
    assert lag.most == 110
    lag.add(90, launches=LAUNCH_QUEUE + 2, waits=0)
    assert lag.most == 130
