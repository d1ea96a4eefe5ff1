"""Checks that a resumed run matches the run it continues, so that its result equals, bit for bit, an uninterrupted one.

Some differences are allowed, because they do not change the result or change it by rounding only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.settings import DryRunConfig, OutputConfig
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


_FINGERPRINTED = {"model", "data", "eval_data"}
"""Settings that name folders and files. Those may move, so their content is compared in place of their name."""

FREE = _FINGERPRINTED | {
    "kernels",
    *(field.name for section in (OutputConfig, DryRunConfig) for field in dataclasses.fields(section)),
    "batch",
    "checkpointing",
    "offload_activations",
    "offload_base",
    "split",
    "threads",
}
"""Settings that a resumed run may change. They do not change a bit of the adapter, except ``kernels``, which changes
its rounding; a note says so."""

_SPLIT = ("micro_batch", "accumulation")
_LENGTH = ("max_steps", "epochs")
_ROUNDING = ("loss_chunk", "kernels", "shard")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "liger-kernel")
SAMPLE = 1024
"""Elements of each parameter that a fingerprint is taken of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The facts about a run that its checkpoints record beside its state. All values are plain JSON."""

    settings: Mapping[str, Any]
    """Every setting by name."""
    threads: int
    """CPU threads that torch computed with."""
    device: str
    """Kind of device: cpu or cuda."""
    base: str
    """Fingerprint of the base model's weights."""
    data: str
    """Fingerprint of the tokens of the training rows."""
    versions: Mapping[str, str]
    """Versions of the packages that compute, and the name of the GPU if there is one."""
    ranks: int = 1
    """Processes that train together."""


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that compute, and the name of the GPU if there is one."""
    found = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(model: nn.Module, wholes: Mapping[str, Any] | None = None) -> str:
    """Return a short digest of a model's parameters: their names, shapes, dtypes and first elements.

    Only the first 1,024 elements of each are hashed: hashing 40 GB at every start would take long and find little more.

    Args:
        model: the base.
        wholes: for each parameter of which this rank holds a part, by name, the shape of the whole (``packed``) and its
            ``first`` elements.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = (wholes or {}).get(name)
        shape = parameter.shape if whole is None else whole.packed
        first = parameter.detach().reshape(-1)[:SAMPLE] if whole is None else whole.first
        digest.update(f"{name}{tuple(shape)}{parameter.dtype}".encode())
        sample = first.contiguous().view(torch.uint8).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(recorded: RunFacts, now: RunFacts, *, split_matters: str | None = None) -> list[str]:
    """Compare a run with the run that it continues.

    Args:
        recorded: facts of the run that is continued.
        now: facts of the run that continues it.
        split_matters: why the gradient of this model depends on how a window is split into micro-batches; None if it
            does not.

    Returns:
        Notes for the user, on differences that may change the last bits of the result.

    Raises:
        ConfigError: a difference would change the result; the error has the field, both values and the remedy.
    """
    notes, problems = check_settings(recorded.settings, now.settings), []
    for field, before, after, what in (
        ("threads", recorded.threads, now.threads, "with another number of CPU threads, sums are rounded differently"),
        ("device", recorded.device, now.device, "another kind of device rounds differently"),
        ("model", recorded.base, now.base, "the base model's weights are not those this run began with"),
        ("data", recorded.data, now.data, "the training rows are not those this run began with"),
    ):
        if before != after:
            problems.append(_changed(field, before, after, what))
    if split_matters:
        pairs = ((name, recorded.settings.get(name), now.settings[name]) for name in _SPLIT)
        problems += [_changed(name, had, has, split_matters) for name, had, has in pairs if had != has]
    if problems:
        raise ConfigError(*problems)
    if recorded.ranks != now.ranks:
        drawn = ", and dropout draws other numbers" if now.settings["dropout"] else ""
        notes.append(
            f"the number of processes was {recorded.ranks} and is now {now.ranks}: the result is equal up to rounding, "
            f"not exactly{drawn}"
        )
    if "kernels" not in recorded.settings and now.device == "cuda" and now.settings["kernels"] != "torch":
        notes.append("this run began without fused kernels: the result is equal up to rounding, not exactly")
    for name in {**recorded.versions, **now.versions}:
        old, new = (facts.versions.get(name, "not installed") for facts in (recorded, now))
        if old != new:
            notes.append(f"{name} was {old} and is now {new}: the last bits may differ")
    return notes


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare the settings of two runs, as :func:`compare` does. This needs no model and no data.

    Returns:
        Notes for the user, on differences that change the result by rounding only.

    Raises:
        ConfigError: a setting that changes the result is different.
    """
    other = {name for name in now if name in before and before[name] != now[name]}
    notes = [f"{name} changed: the result is equal up to rounding, not exactly" for name in _ROUNDING if name in other]
    changed = other - FREE - set(_ROUNDING)
    if now["schedule"] == "constant" and changed & set(_LENGTH):
        changed -= set(_LENGTH)  # with a constant rate, the steps so far do not depend on the run's length
    if changed & set(_SPLIT) and _window(before) == _window(now) and not now["packing"] and now["dropout"] == 0:
        changed -= set(_SPLIT)
        notes.append("the window is split into other micro-batches: the result is equal up to rounding, not exactly")
    if changed:
        what = "this setting changes the result"
        raise ConfigError(*(_changed(name, before[name], now[name], what) for name in now if name in changed))
    return notes


def _window(settings: Mapping[str, Any]) -> int:
    return int(settings["micro_batch"]) * int(settings["accumulation"])


def _changed(field: str, before: object, now: object, what: str) -> Problem:
    remedy = f"set it back to {before!r}, or start a new run with another --output"
    return Problem(field=field, value=now, why=f"the run that is resumed had {before!r}: {what}", remedy=remedy)
