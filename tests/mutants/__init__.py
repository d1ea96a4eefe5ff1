"""The bugs that ``mutation.py`` plants: five or more in each module of finetune that has room for them.

A module of pytest_vram on which finetune rests may have some too.
"""

from __future__ import annotations

from mutants import devices, estimates, kernels, memory, models, quantization, rows, saving, settings, training
from mutants.anchor import Bug

Planted = tuple[list[str], list[Bug]]
"""The tests that are to notice, the likeliest first; and the bugs."""

MUTANTS: dict[str, Planted] = {
    **quantization.BUGS,
    **models.BUGS,
    **rows.BUGS,
    **training.BUGS,
    **kernels.BUGS,
    **saving.BUGS,
    **settings.BUGS,
    **memory.BUGS,
    **estimates.BUGS,
    **devices.BUGS,
}
"""By the module's path in the repository, without its suffix."""
