"""What a resumed run must share with the run it resumes, so that its result is the uninterrupted one's, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune import configfile
from finetune.config import DryRunConfig, OutputConfig
from finetune.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from finetune.config import RunConfig

_FINGERPRINTED = {"model", "data", "eval_data"}
"""Names of folders and files: they may move, what is in them is compared instead."""

FREE = _FINGERPRINTED | {
    "kernels",
    *(field.name for section in (OutputConfig, DryRunConfig) for field in dataclasses.fields(section)),
    "checkpointing",
    "offload_activations",
    "threads",
}
"""Settings that may change between a run and its resumption: they change no bit of the adapter, kernels excepted, which
are noted."""

_SPLIT = ("micro_batch", "accumulation")
_LENGTH = ("max_steps", "epochs")
_ROUNDING = ("loss_chunk", "kernels")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "liger-kernel")
_SAMPLE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a checkpoint records of its run besides the numbers themselves; plain JSON inside."""

    settings: Mapping[str, Any]
    """Every setting by name."""
    threads: int
    """CPU threads torch computed with."""
    device: str
    """Kind of device: cpu or cuda."""
    base: str
    """Fingerprint of the base model's weights."""
    data: str
    """Fingerprint of the training rows as tokens."""
    versions: Mapping[str, str]
    """Versions of the packages that compute."""


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Every setting by name, as plain JSON."""
    return {
        name: list(value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, (int, float))
        else value and str(value)
        for name, value in configfile.flatten(config).items()
    }


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that compute, and the GPU."""
    found = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model's parameters: names, shapes, dtypes, and the first bytes of each.

    A sample, because hashing 40 GB at every start is not worth what it could find beyond this.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample = parameter.detach().reshape(-1)[:_SAMPLE].contiguous().view(torch.uint8).cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(recorded: RunFacts, now: RunFacts, *, split_matters: str | None = None) -> list[str]:
    """Hold a run against the one it resumes.

    Args:
        recorded: of the run that is resumed.
        now: of the run that goes on.
        split_matters: why this model's gradient is another where the same window is split another way, if it is.

    Returns:
        Notes for the user: differences that may change the last bits of the result, not its meaning.

    Raises:
        ConfigError: a difference that makes it another run, with the field, both values and the remedy.
    """
    notes, problems = check_settings(recorded.settings, now.settings), []
    for field, before, after, what in (
        ("threads", recorded.threads, now.threads, "another count of CPU threads adds up in another order"),
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
    for name, version in recorded.versions.items():
        if now.versions.get(name) != version:
            notes.append(f"{name} was {version}, is {now.versions.get(name)}: the last bits may differ")
    return notes


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings' part of :func:`compare`, which can be told before anything is loaded."""
    other = {name for name in now if name in before and before[name] != now[name]}
    notes = [f"{name} changed: equal up to rounding, no longer byte for byte" for name in _ROUNDING if name in other]
    changed = other - FREE - set(_ROUNDING)
    if now["schedule"] == "constant" and changed & set(_LENGTH):
        changed -= set(_LENGTH)  # without a decay, the steps so far are the first steps of the longer run
    if changed & set(_SPLIT) and _window(before) == _window(now) and not now["packing"] and now["dropout"] == 0:
        changed -= set(_SPLIT)
        notes.append("the same window is split another way: equal up to rounding, no longer byte for byte")
    if changed:
        what = "it changes what is computed"
        raise ConfigError(*(_changed(name, before[name], now[name], what) for name in now if name in changed))
    return notes


def _window(settings: Mapping[str, Any]) -> int:
    return int(settings["micro_batch"]) * int(settings["accumulation"])


def _changed(field: str, before: object, now: object, what: str) -> Problem:
    remedy = f"set it back to {before!r}, or start a new run with another --output"
    return Problem(field=field, value=now, why=f"the run that is resumed had {before!r}: {what}", remedy=remedy)
