"""Checkpoints: written whole or not at all, checked before they are believed, and enough to go on exactly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.disk import durable
from finetune.disk.state import Tree, pack, unpack
from finetune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

FORMAT = 1
_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", "state.safetensors"
_PREFIX = "step-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was held against its manifest."""

    path: Path
    step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any]
    """What :func:`save` was told about the run, as plain JSON."""
    state: Tree
    """What :func:`save` was given: weights, optimizer, random generators. On the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A checkpoint that is not used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} is not used: {self.reason}"


def save(folder: Path, *, step: int, facts: Mapping[str, Any], state: Tree, keep: int) -> Path:
    """Write ``folder/step-N`` and remove all but the newest ``keep``.

    The folder appears under its name by one rename, after every file in it is on the disk: a process killed, or a
    power cut, at any moment leaves the earlier checkpoints and nothing that could be taken for one.

    Args:
        folder: where a run's checkpoints are.
        step: optimizer steps done.
        facts: plain JSON that :func:`load` gives back.
        state: nested dicts and lists of tensors and numbers (:data:`finetune.disk.state.Tree`).
        keep: how many checkpoints stay, this one included.

    Raises:
        WriteError: the disk is full or refuses; the earlier checkpoints are untouched.
    """
    tensors, skeleton = pack(state)
    path = folder / f"{_PREFIX}{step:08d}"
    with durable.folder(path) as aside:
        save_file(tensors, aside / _TENSORS)
        record = {"format": FORMAT, "step": step, "facts": dict(facts), "skeleton": skeleton}
        (aside / _STATE).write_text(json.dumps(record), encoding="utf-8")
        files = {name: _identity(aside / name) for name in (_TENSORS, _STATE)}
        manifest = {"format": FORMAT, "files": files, "sha256": _digest_of(files)}
        (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for old in paths(folder)[keep:]:
        durable.remove_folder(old)
    return path


def paths(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first, sound or not."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[Refused]]:
    """The newest sound checkpoint, and those newer than it that are damaged.

    Returns:
        ``(None, [])`` where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    refused: list[Refused] = []
    for path in paths(folder):
        try:
            return load(path), refused
        except CheckpointError as error:
            refused.append(Refused(path=path, reason=str(error)))
    if refused:
        raise CheckpointError(
            "no checkpoint is sound:\n"
            + "\n".join(f"  {refusal}" for refusal in refused)
            + f"\nRemove {folder} to start this run from the beginning, or choose another --output."
        )
    return None, []


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, each file held against its size and SHA-256 in the manifest first.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is of another version.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        files, digest, version = manifest["files"], manifest["sha256"], manifest["format"]
    except OSError as error:
        raise CheckpointError(f"{_MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{_MANIFEST} is truncated or altered") from None
    if version != FORMAT:
        raise CheckpointError(f"its format is {version}, this version reads {FORMAT}")
    if digest != _digest_of(files) or set(files) != {_TENSORS, _STATE}:
        raise CheckpointError(f"{_MANIFEST} is altered: its own checksum does not match")
    for name, expected in files.items():
        try:
            found = _identity(path / name)
        except OSError as error:
            raise CheckpointError(f"{name}: {error.strerror}") from None
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(f"{name} has {found['bytes']:,} bytes instead of {expected['bytes']:,}: truncated")
        if found["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{name} is altered: its SHA-256 is not the manifest's")
    record = json.loads((path / _STATE).read_bytes())
    try:
        tensors: dict[str, torch.Tensor] = load_file(path / _TENSORS)
    except SafetensorError as error:
        raise CheckpointError(f"{_TENSORS}: {error}") from None
    return Checkpoint(path=path, step=record["step"], facts=record["facts"], state=unpack(tensors, record["skeleton"]))


def _identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _digest_of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
