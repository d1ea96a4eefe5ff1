"""Names the files of a run. No other module knows these names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The output folder of one run, and the paths of the files and folders in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings of the run, as YAML."""
        return self.path / "config.yaml"

    @property
    def train_rows(self) -> Path:
        """JSON lines, one for each optimizer step."""
        return self.path / "train.jsonl"

    @property
    def eval_rows(self) -> Path:
        """JSON lines, one for each evaluation."""
        return self.path / "eval.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; each is a folder in it."""
        return self.path / "checkpoints"

    @property
    def merged(self) -> Path:
        """The folder of the merged model, if ``--merge`` asks for one."""
        return self.path / "merged"

    @property
    def summary(self) -> Path:
        """The run's figures, as JSON."""
        return self.path / "summary.json"

    def trained(self, *, full: bool) -> Path:
        """Return the folder of the result: of the adapter, or with ``--full`` of the whole model."""
        return self.path / ("model" if full else "adapter")

    def written(self) -> list[Path]:
        """Return every path that a run may write here, except its settings, whether it exists or not."""
        results = [self.trained(full=False), self.trained(full=True), self.merged]
        return [self.checkpoints, *results, self.tensorboard, self.summary, self.train_rows, self.eval_rows]
