"""The bugs that ``mutation.py`` plants, five or more in each module of finetune."""

from __future__ import annotations

from mutants import memory, quantization, rows, saving, settings, training

Planted = tuple[list[str], list[tuple[str, str]]]
"""The tests that are to notice, the likeliest first; and pairs of the right text and the wrong one."""

MUTANTS: dict[str, Planted] = {
    **quantization.BUGS,
    **rows.BUGS,
    **training.BUGS,
    **saving.BUGS,
    **settings.BUGS,
    **memory.BUGS,
}
"""By the module's path in the repository, without its suffix."""
