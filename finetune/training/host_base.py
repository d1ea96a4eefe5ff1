"""Checks, before a base is loaded, whether the host has room for the parts that its ranks keep there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune import launch
from finetune.disk import host_memory
from finetune.errors import ConfigError
from finetune.estimate.sharding import bytes_on_host
from finetune.model.host_copies import has_room
from finetune.model.host_parts import no_room
from finetune.model.load import load_config
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from finetune.config.settings import RunConfig


def require_host_memory(config: RunConfig) -> None:
    """Refuse ``--offload-base`` where the parts of this machine's ranks do not fit into its memory.

    If the arithmetic does not know the model, nothing is refused here. Each piece of memory is then checked when it is
    taken, while the base is loaded. Ranks on dry GPUs stand for another machine, and are never refused.

    Raises:
        ConfigError: there is not enough memory.
    """
    if not config.model.offload_base:
        return
    try:
        part = bytes_on_host(config, load_config(config.model).to_dict(), ranks=launch.size())
    except (ConfigError, KeyError):
        return
    here = part * launch.local_size()
    if not has_room(here):
        raise no_room(
            f"the parts of this machine's {launch.local_size()} ranks take {here / GIB:.2f} GiB of pinned host memory, "
            f"and there is room for {max(0, host_memory.pinnable_bytes()) / GIB:.2f} GiB"
        )
