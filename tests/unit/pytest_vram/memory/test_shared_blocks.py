"""The note of blocks that streams share names its bytes, and they can be read back."""

from __future__ import annotations

import pytest

from pytest_vram.memory import Note, shared_blocks


@pytest.mark.parametrize("size", [0, 512, 33_554_432])
def test_the_bytes_of_the_text_can_be_read_back(size: int) -> None:
    note = Note(name=shared_blocks.NAME, text=shared_blocks.text(size), source="operators")
    assert shared_blocks.bytes_more(note) == size
    assert f"{size:,} bytes more" in note.text


def test_other_notes_name_no_bytes() -> None:
    assert shared_blocks.bytes_more(Note(name="NCCL", text=shared_blocks.text(5), source="driver")) == 0
    assert shared_blocks.bytes_more(Note(name=shared_blocks.NAME, text="up to 5 bytes more", source="driver")) == 0
