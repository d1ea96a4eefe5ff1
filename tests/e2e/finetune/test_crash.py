"""``kill -9`` at any moment, ``--resume``, and the adapter is byte for byte that of the uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked

OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
# Rank 64 makes every matrix large enough for 8-bit states; a mixed window, dropout and packing are on.
FLAGS = ("--dropout", "0.1", "--packing", "--rank", "64", "--epochs", "2")
KILLS = 2


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(qlora: Forked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """The uninterrupted run of each optimizer, and how many moments it has."""
    runs = {}
    for optimizer in OPTIMIZERS:
        output = tmp_path_factory.mktemp("straight") / optimizer
        outcome = qlora(output, *FLAGS, "--optimizer", optimizer)
        assert outcome.code == 0, outcome.err
        runs[optimizer] = output, outcome.moments
    return runs


def test_the_optimizers_are_really_different(straight: dict[str, tuple[Path, int]]) -> None:
    kinds = {name: adapter(output) for name, (output, _) in straight.items()}
    assert kinds["adamw-8bit"] == kinds["paged-adamw-8bit"]  # paging changes where the state is, not what it is
    assert len(set(kinds.values())) == 3


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_twice_and_resumed_is_the_straight_run(
    qlora: Forked, straight: dict[str, tuple[Path, int]], tmp_path: Path, optimizer: str, number: int
) -> None:
    expected, moments = straight[optimizer]
    rng = random.Random(f"{optimizer}-{number}")
    output, flags = tmp_path / "run", (*FLAGS, "--optimizer", optimizer)
    for attempt, resume in enumerate([(), ("--resume",)]):
        at = rng.randint(1 if attempt else moments // 3, moments)  # the first time late enough to resume from something
        killed = qlora(output, *flags, *resume, fault={"kind": "signal", "at": at, "signals": [signal.SIGKILL]})
        assert killed.code == -signal.SIGKILL or (attempt and killed.code == 0), killed.err
    last = qlora(output, *flags, "--resume")
    assert last.code == 0, last.err
    assert "resuming" in last.err
    assert adapter(output) == adapter(expected)
    assert steps(output) == steps(expected)


def test_killed_while_checkpoints_are_written(qlora: Forked, finished: tuple[Path, Any], tmp_path: Path) -> None:
    """Every step saved, so that most moments lie inside a save."""
    output = tmp_path / "run"
    rng = random.Random(0)
    for attempt in range(4):
        fault = {"kind": "signal", "at": rng.randint(20, 60), "signals": [signal.SIGKILL]}
        killed = qlora(output, "--save-every", "1", "--keep", "1", *(["--resume"] if attempt else []), fault=fault)
        assert killed.code in (-signal.SIGKILL, 0), killed.err
    last = qlora(output, "--resume")
    assert last.code == 0, last.err
    assert adapter(output) == adapter(finished[0])


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    qlora: Forked, finished: tuple[Path, Any], tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "run"
    # Moment counts are the same in every run: two thirds of the way lies past the second checkpoint.
    fault = {"kind": "signal", "at": finished[1].moments * 2 // 3, "signals": [signal.SIGKILL]}
    qlora(output, fault=fault)
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if damage == "altered" else data[:-1])
    resumed = qlora(output, "--resume")
    assert resumed.code == 0, resumed.err
    assert f"{newest} is not used" in resumed.err
    assert damage in resumed.err
    assert adapter(output) == adapter(finished[0])
