"""Engines for many ranks get through, and every rank holds what its part is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = Path(__file__).parent / "programs" / "launched.py"
WHOLE = 4 * 256 * 256  # the model's elements
TWO = ("ddp", "zero1", "fsdp1", "fsdp2", "tensor_parallel", "pipeline", "gpipe", "experts")
FOUR = ("hsdp", "zero1", "fsdp1", "fsdp2", "tensor_parallel", "pipeline", "experts")

Ranks = list[dict[str, Any]]


def engines(run_program: Callable[..., Any], count: int, *names: str) -> dict[str, Ranks]:
    found: dict[str, Ranks] = run_program("engines.py", str(count), *names, gpu="a100-80", count=count)
    for name, ranks in found.items():
        assert not [rank for rank in ranks if rank is None or "error" in rank], (name, ranks)
    return found


@pytest.fixture(scope="module")
def two(run_program: Callable[..., Any]) -> dict[str, Ranks]:
    return engines(run_program, 2, *TWO)


@pytest.fixture(scope="module")
def four(run_program: Callable[..., Any]) -> dict[str, Ranks]:
    return engines(run_program, 4, *FOUR)


def check(found: dict[str, Ranks], count: int) -> None:
    parts = {"ddp": 1, "zero1": 1, "hsdp": 2, "fsdp1": count, "fsdp2": count, "tensor_parallel": count}
    for name, ranks in found.items():
        if name in parts:
            assert [rank["parameters"] for rank in ranks] == [WHOLE // parts[name]] * count, name
            assert len({rank["peak"] for rank in ranks}) == 1, (name, ranks)  # the ranks are alike
    assert sum(rank["states"] for rank in found["zero1"]) == 2 * WHOLE  # AdamW's, each on one rank
    assert [rank["parameters"] for rank in found["pipeline"]] == [256 * 256] * count
    # Rank 0's eight tokens go round the experts; the others send all of theirs to the first one.
    received = [rank["received"] for rank in found["experts"]]
    assert received[0] == [8 // count] + [8] * (count - 1)
    assert received[1:] == [[8 // count] + [0] * (count - 1)] * (count - 1)
    assert [rank["tokens"] for rank in found["experts"]] == [sum(row) for row in received]


def test_two_ranks(two: dict[str, Ranks]) -> None:
    check(two, 2)
    assert two["fsdp2"][0]["peak"] < two["ddp"][0]["peak"]
    assert two["zero1"][0]["peak"] < two["ddp"][0]["peak"]
    assert two["gpipe"][0]["parameters"] == 256 * 256


def test_four_ranks(four: dict[str, Ranks]) -> None:
    check(four, 4)
    assert four["fsdp2"][0]["peak"] < four["hsdp"][0]["peak"]


def test_eight_ranks(run_program: Callable[..., Any]) -> None:
    found = engines(run_program, 8, "fsdp2")
    assert {rank["parameters"] for rank in found["fsdp2"]} == {WHOLE // 8}


@pytest.mark.parametrize(
    ("what", "launcher"),
    [
        ("accelerate", ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines=1",
                        "--mixed_precision=bf16", "--dynamo_backend=no", "--main_process_port=0")),
        ("trainer", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")),
    ],
)  # fmt: skip
def test_what_launchers_start(
    dry_python: Callable[..., Any], tmp_path: Path, what: str, launcher: tuple[str, ...]
) -> None:
    done = dry_python(*launcher, str(PROGRAM), what, str(tmp_path), gpu="a100-80", count=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    if what == "accelerate":
        assert one["kind"] == "DistributedType.MULTI_GPU"
        assert (one["losses"], one["ranks"]) == (2, [0, 1])
        assert (tmp_path / "state" / "random_states_1.pkl").exists()
    else:
        assert one["steps"] == 3
        assert one["saved"] == ["checkpoint-3"]
        assert one["evaluated"]
