"""Writes and reads checkpoints. Each is complete or absent, is verified when read, and continues a run exactly."""

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
    """A checkpoint that was read, and whose files all match the checksums of its manifest."""

    path: Path
    step: int
    """Optimizer steps done."""
    facts: Mapping[str, Any]
    """The facts of the run that :func:`save` got, as plain JSON."""
    state: Tree
    """The state that :func:`save` got: weights, optimizer, random generators. Its tensors are on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A damaged checkpoint, which is not used, and the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} is not used: {self.reason}"


def save(folder: Path, *, step: int, facts: Mapping[str, Any], state: Tree, keep: int) -> Path:
    """Write ``folder/step-N``, then remove all checkpoints but the newest ``keep``.

    Every file is flushed to the disk before the folder gets its name by one rename. If the process is killed or the
    power fails at any moment, the earlier checkpoints remain, and no incomplete one looks like a checkpoint.

    Args:
        folder: the folder of the run's checkpoints.
        step: optimizer steps done.
        facts: facts about the run as plain JSON, which :func:`load` returns.
        state: nested dicts and lists of tensors and numbers (:data:`finetune.disk.state.Tree`).
        keep: how many checkpoints are kept, this one included.

    Returns:
        The path of the new checkpoint.

    Raises:
        WriteError: the disk is full or not writable; the earlier checkpoints are untouched.
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
    """Return the checkpoints in ``folder``, the newest first. They are not verified."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[Refused]]:
    """Read the newest checkpoint that is sound.

    Returns:
        The checkpoint, and the damaged ones that are newer; ``(None, [])`` if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    refused: list[Refused] = []
    for path in paths(folder):
        try:
            return load(path), refused
        except CheckpointError as error:
            refused.append(Refused(path=path, reason=str(error)))
    if refused:
        raise CheckpointError(
            "every checkpoint is damaged:\n"
            + "\n".join(f"  {refusal}" for refusal in refused)
            + f"\nRemove {folder} to start this run from the beginning, or choose another --output."
        )
    return None, []


def load(path: Path) -> Checkpoint:
    """Compare the size and SHA-256 of each file with the manifest, then read the checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or another version of finetune wrote the format.
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
