"""The files of a run: the one place that knows what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The output folder of one run, and the path of everything that a run writes into it."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings of the run, as YAML."""
        return self.path / "config.yaml"

    @property
    def train_rows(self) -> Path:
        """One JSON line for each optimizer step."""
        return self.path / "train.jsonl"

    @property
    def eval_rows(self) -> Path:
        """One JSON line for each evaluation."""
        return self.path / "eval.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def merged(self) -> Path:
        """The merged model, where ``--merge`` asks for one."""
        return self.path / "merged"

    @property
    def summary(self) -> Path:
        """The run's figures, as JSON."""
        return self.path / "summary.json"

    def trained(self, *, full: bool) -> Path:
        """Return the folder of the result: the adapter, or with ``--full`` the whole model."""
        return self.path / ("model" if full else "adapter")

    def written(self) -> list[Path]:
        """Return the path of everything but the settings that a run may have left here, whether it exists or not."""
        results = [self.trained(full=False), self.trained(full=True), self.merged]
        return [self.checkpoints, *results, self.tensorboard, self.summary, self.train_rows, self.eval_rows]
