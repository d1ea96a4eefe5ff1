"""A checkpoint is complete or absent, a damaged one is refused by name, and a full disk loses no earlier one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from finetune.disk import checkpoint, durable
from finetune.disk.state import pack, random_state, restore_random_state, unpack
from finetune.errors import CheckpointError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable


def state(step: int) -> dict[str, Any]:
    shared = torch.arange(4.0)
    return {
        "weights": {"a": torch.full((3, 2), float(step)), "b": torch.tensor([1, 2], dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": step, "map": shared}, 1: {"map": shared}},
            "groups": [{"betas": (0.9, 0.999)}],
        },
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, step=step, facts={"step": step, "none": None}, state=state(step), keep=keep)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found, refused = checkpoint.newest(tmp_path)
    assert found is not None
    assert refused == []
    assert (found.step, found.facts) == (3, {"step": 3, "none": None})
    assert torch.equal(found.state["weights"]["a"], torch.full((3, 2), 3.0))
    assert found.state["weights"]["b"].dtype == torch.bfloat16
    assert found.state["optimizer"]["groups"] == [{"betas": (0.9, 0.999)}]
    assert list(found.state["optimizer"]["state"]) == [0, 1]


def test_a_tensor_held_twice_is_one_tensor_again() -> None:
    tensors, skeleton = pack(state(1))
    back = unpack(tensors, skeleton)["optimizer"]["state"]
    assert back[0]["map"] is back[1]["map"]
    assert len(tensors) == 3


def test_a_view_is_kept_by_its_numbers_alone(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    views = {"turned": whole.T, "column": whole[:, 1], "row": whole[1], "expanded": torch.ones(1).expand(5)}
    path = checkpoint.save(tmp_path, step=1, facts={}, state=views, keep=1)
    found = checkpoint.load(path).state
    assert all(torch.equal(found[name], view) for name, view in views.items())
    assert sum(tensor.untyped_storage().nbytes() for tensor in found.values()) == 4 * (12 + 3 + 4 + 5)


def test_state_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match="holds a object"):
        pack({"a": object()})
    with pytest.raises(TypeError, match="key"):
        pack({(1, 2): 3})


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.paths(tmp_path)] == ["step-00000010", "step-00000009"]
    assert not list(tmp_path.glob(".*"))


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "altered": flip, "removed": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    DAMAGES[damage](bad / name)
    found, refused = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [r.path for r in refused] == [bad]
    assert name in refused[0].reason


def test_a_manifest_altered_with_its_file_is_refused(tmp_path: Path) -> None:
    bad = save(tmp_path, 2)
    flip(bad / "state.json")
    manifest = bad / "manifest.json"
    digest = checkpoint._identity(bad / "state.json")["sha256"]
    lines = manifest.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "state.json" in line)
    lines[at + 2] = f'      "sha256": "{digest}"'
    manifest.write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(bad)


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(tmp_path, step) / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)step-00000002.*truncated.*step-00000001.*truncated"):
        checkpoint.newest(tmp_path)


def test_a_format_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="its format is 1, this version reads 2"):
        checkpoint.load(path)


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


CALLS = ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


@pytest.mark.parametrize("moment", range(0, 45, 3))
def test_stopped_at_any_system_call_the_earlier_checkpoints_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Whatever call of the save is the last one made, what can be loaded afterwards is step 1, 2 or 3, whole."""
    for step in (1, 2):
        save(tmp_path, step)
    counter = itertools.count()

    class Killed(BaseException):
        pass

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(counter) >= moment:  # from then on nothing reaches the disk, cleaning up included
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        with contextlib.suppress(Killed):
            save(tmp_path, 3)
    found, refused = checkpoint.newest(tmp_path)
    assert found is not None
    assert refused == []
    assert found.step in (2, 3)
    assert torch.equal(found.state["weights"]["a"], torch.full((3, 2), float(found.step)))
    durable.remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert {p.name for p in checkpoint.paths(tmp_path)} >= {f"step-{found.step:08d}"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    before = tree_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(WriteError, match=r"step-00000003: No space left on device.*MiB are free.*--resume"):
        save(tmp_path, 3)
    assert tree_of(tmp_path) == before


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), durable.folder(tmp_path / "new"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_folder_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with durable.folder(tmp_path / "result") as aside:
            (aside / name).write_text(name)
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
    assert [p.name for p in (tmp_path / "result").iterdir()] == ["b"]


def test_lines_are_cut_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = durable.Lines(path, keep=0)
    for step in (1, 2, 3):
        lines.append({"step": step})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the power went here
    lines = durable.Lines(path, keep=2)
    lines.append({"step": 3, "again": True})
    lines.close()
    assert durable.read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def draws() -> list[Any]:
    return [random.random(), float(np.random.rand()), np.random.normal(), random.gauss(0, 1), torch.rand(3).tolist()]


def test_every_generator_goes_on_where_it_was() -> None:
    random.gauss(0, 1)  # leaves a cached second value behind, as numpy's does
    np.random.normal()
    tensors, skeleton = pack(random_state())
    first = draws()
    restore_random_state(unpack(tensors, skeleton))
    assert draws() == first
