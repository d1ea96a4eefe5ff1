"""Parts of a base in host memory: the same values, in few pieces, and a refusal where there is no room."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import ConfigError
from finetune.model import host_copies, host_parts
from finetune.model.host_parts import HostParts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_parts, "PIECE", 256)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_copies_have_the_values_shape_and_dtype_of_what_was_copied(dtype: torch.dtype) -> None:
    parts = HostParts(pinned=False)
    values = [torch.arange(number, number + 6).view(2, 3).T.to(dtype) for number in range(9)]
    copies = [parts.copy(each) for each in values]
    for copy, own in zip(copies, values, strict=True):
        assert torch.equal(copy, own)
        assert copy.dtype == dtype
        assert copy.is_contiguous()


def test_small_parts_share_a_piece_and_a_large_one_has_its_own() -> None:
    parts = HostParts(pinned=False)
    sizes = (100, 100, 100, 1000, 0)
    pieces = [parts.copy(torch.ones(size, dtype=torch.uint8)).untyped_storage() for size in sizes]
    assert [len(piece) for piece in pieces] == [256, 256, 256, 1000 + 24, 1000 + 24]
    first, second, third, large, empty = (piece.data_ptr() for piece in pieces)
    assert first == second != third
    assert large == empty


def test_a_host_without_room_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies.host_memory, "limit_bytes", lambda: 2000)
    monkeypatch.setattr(host_copies.host_memory, "available_bytes", lambda: 1100)
    parts = HostParts(pinned=False)
    parts.copy(torch.ones(1000, dtype=torch.uint8)[:900])
    with pytest.raises(ConfigError, match="1,100 bytes left") as caught:
        parts.copy(torch.ones(1001, dtype=torch.uint8))
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("offload_base", True)
    assert "--no-offload-base, with which the parts stay on the cards" in problem.remedy
