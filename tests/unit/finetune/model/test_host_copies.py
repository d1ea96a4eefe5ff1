"""Host memory is refused where little of it would be left, and what is copied on a CPU is there at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from finetune.disk import host_memory
from finetune.model import host_copies
from finetune.model.host_copies import copies_of


@pytest.mark.parametrize(("dry", "left", "refused"), [(False, 49, True), (False, 51, False), (True, 0, False)])
def test_a_twentieth_of_the_hosts_memory_stays(
    monkeypatch: pytest.MonkeyPatch, dry: bool, left: int, refused: bool
) -> None:
    """A dry GPU stands for another machine."""
    monkeypatch.setattr(host_memory, "limit_bytes", lambda: 1000)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 200)
    monkeypatch.setattr(host_copies, "is_active", lambda: dry)
    if not refused:
        host_copies.require_room(200 - left)
        return
    with pytest.raises(RuntimeError, match="the host has 200 bytes left"):
        host_copies.require_room(200 - left)


def test_the_system_is_asked_once_and_what_is_pinned_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when everything was given back, as between the trials of a run and the run itself."""
    asked = []
    page = 4096

    class Runtime:
        cudaHostRegister = cudaHostUnregister = staticmethod(lambda *_: 0)  # noqa: N815 - the runtime's names

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    monkeypatch.setattr(host_copies, "is_active", lambda: False)
    monkeypatch.setattr(host_memory, "pinnable_bytes", lambda: asked.append(1) or 3 * page)
    copies = host_copies.CardCopies(torch.device("cuda"))
    buffers = [copies.allocate(page - 1), copies.allocate(2 * page)]
    with pytest.raises(RuntimeError, match="bytes left"):
        copies.allocate(1)
    copies.free(buffers[:1])
    buffers[0] = copies.allocate(page)
    assert len(asked) == 1
    copies.free(buffers)
    copies.allocate(3 * page)
    assert len(asked) == 2


def test_on_a_cpu_a_copy_is_done_when_it_returns() -> None:
    copies = copies_of(torch.device("cpu"))
    host = copies.allocate(8)
    copies.wait(copies.start(host, torch.arange(8, dtype=torch.uint8)))
    assert host.tolist() == list(range(8))
    copies.free([host])
    assert copies_of(torch.device("cpu")) is copies
