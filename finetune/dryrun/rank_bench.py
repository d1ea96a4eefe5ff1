"""A bench that is one rank of several: what it decides rests on the rank that needs most, so that all decide alike."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from finetune.dryrun.several import worst
from finetune.dryrun.trial import Bench

if TYPE_CHECKING:
    from finetune.config.settings import RunConfig
    from finetune.dryrun.messages import Trial


class RankBench(Bench):
    """A bench for a search. All ranks have to try the same settings in the same order."""

    def run(self, config: RunConfig, **how: Any) -> Trial:
        """Take the steps in all ranks, and return the trial of the rank that needs most.

        Raises:
            RuntimeError: memory ran out. A search over ranks runs on cards that are large enough for all trials.
        """
        from finetune.training import ranks

        own = super().run(config, **how)
        if not own.fits:
            raise RuntimeError(f"a search over ranks needs a larger dry card: {own.message}")
        # The others decide without the recording, which is large.
        return worst(ranks.gathered(dataclasses.replace(own, recording=None, host_reads=())))
