"""Whether a host has room for the parts of its ranks is known before a base is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from finetune import launch
from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.errors import ConfigError
from finetune.model import host_copies
from finetune.training import host_base
from finetune.training.host_base import require_host_memory
from pytest_vram.shapes import SHAPES
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 20 GiB, of which 1 has to stay free, with two of four ranks."""
    monkeypatch.setattr(host_base.host_memory, "limit_bytes", lambda: 20 * GIB)
    monkeypatch.setattr(launch, "size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def asked(folder: Path, fields: dict[str, object], *, offload: bool = True) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return yaml_file.replace(RunConfig(), {"model": str(folder), "shard": True, "offload_base": offload})


@pytest.mark.usefixtures("host")
def test_the_parts_of_all_ranks_of_the_machine_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B has 6,476,005,376 weights in its layers; at 4.127 bits each, half of that is 1.56 GiB."""
    config = asked(tmp_path, SHAPES["llama-2-7b"].fields())
    monkeypatch.setattr(host_base.host_memory, "available_bytes", lambda: round(2.6 * GIB))
    require_host_memory(config)
    monkeypatch.setattr(host_base.host_memory, "available_bytes", lambda: round(2.5 * GIB))
    with pytest.raises(ConfigError, match=r"2 ranks take 1\.56 GiB of pinned host memory, and there is room for 1\.50"):
        require_host_memory(config)
    require_host_memory(asked(tmp_path, SHAPES["llama-2-7b"].fields(), offload=False))


@pytest.mark.usefixtures("host")
def test_ranks_on_dry_gpus_are_not_refused_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m pytest_vram run -- torchrun ...`` asks about a machine with such cards, and not about this one."""
    monkeypatch.setattr(host_base.host_memory, "available_bytes", lambda: 0)
    monkeypatch.setattr(host_copies, "is_active", lambda: True)
    require_host_memory(asked(tmp_path, SHAPES["llama-2-7b"].fields()))


@pytest.mark.usefixtures("host")
def test_a_model_that_the_arithmetic_does_not_know_is_not_refused_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_base.host_memory, "available_bytes", lambda: 0)
    require_host_memory(asked(tmp_path, {"model_type": "bloom"}))


def test_without_the_option_no_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(tmp_path, SHAPES["llama-2-7b"].fields(), offload=False)
    monkeypatch.delattr(host_base, "load_config")
    require_host_memory(config)
