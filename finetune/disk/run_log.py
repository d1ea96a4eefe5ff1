"""Records a run while it runs: a progress bar, ``train.jsonl``, ``eval.jsonl``, and TensorBoard on request."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from finetune import launch
from finetune.disk import host_memory
from finetune.disk.durable import Lines, read_lines
from finetune.errors import ConfigError, Problem
from pytest_vram.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.disk.run_folder import RunFolder

_LINES_WITHOUT_TERMINAL = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """The figures of one optimizer step, from which a row of ``train.jsonl`` is made."""

    loss: float
    """Mean cross-entropy of the window's targets before the step, in nats."""
    targets: int
    """Number of tokens that the loss was taken on."""
    tokens: int
    """Number of tokens that went through the model, without padding."""
    grad_norm: float
    """Global L2 norm of the gradient, before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    seconds: float
    """Wall time."""
    router_loss: float | None = None
    """The router's weighted load-balancing loss, as the mean over the micro-batches; None if it is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One evaluation, a row of ``eval.jsonl``."""

    step: int
    """Optimizer steps done before it."""
    loss: float | None
    """Mean loss per held-out target, in nats; None without held-out rows."""
    targets: int
    """Held-out tokens that the loss is taken on."""
    question: str | None = None
    """The question that the model was asked; None if there was none."""
    answer: str | None = None
    """The answer of the model, decoded greedily."""


class RunLog:
    """Writes the log files of one run, and shows its progress."""

    def __init__(self, folder: RunFolder, *, start_step: int, total_steps: int, tensorboard: bool) -> None:
        """Open the files in ``folder``, and remove the rows after ``start_step``, whose steps will be repeated.

        Raises:
            ConfigError: TensorBoard is asked for and is not installed.
            WriteError: the disk is full or not writable.
        """
        self.total_steps = total_steps
        self._train = Lines(folder.train_rows, keep=start_step)
        self._eval = Lines(folder.eval_rows, keep=start_step)
        self._writer = _summary_writer(folder.tensorboard, start_step + 1) if tensorboard else None
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._done, self._seconds = 0, 0.0

    def evaluations(self) -> list[EvalRow]:
        """Return every evaluation so far, those from before a resumption included."""
        return [EvalRow(**row) for row in read_lines(self._eval.path)]

    def step(self, step: int, stats: StepStats) -> None:
        """Record one optimizer step."""
        self._done, self._seconds = self._done + 1, self._seconds + stats.seconds
        memory = memory_now()
        speed = stats.tokens / max(stats.seconds, 1e-9)
        row = {"step": step, **asdict(stats), "tokens_per_second": round(speed, 3), **memory}
        self._train.append(row)
        if self._writer:
            for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", *memory):
                self._writer.add_scalar(f"train/{name}", row[name], step)
        held = next(iter(memory.values()))  # the GPU's where there is one
        self._bar.set_postfix_str(f"loss {stats.loss:.3f}, {speed:,.0f} tokens/s, {held / GIB:.2f} GiB", refresh=False)
        self._bar.update()
        if self._bar.disable and (step % max(1, self.total_steps // _LINES_WITHOUT_TERMINAL) == 0):
            self.say(
                f"step {step}/{self.total_steps}  loss {stats.loss:.3f}  {speed:,.0f} tokens/s  "
                f"{held / GIB:.2f} GiB  {self._left(step)} left"
            )

    def evaluation(self, row: EvalRow) -> None:
        """Record one evaluation."""
        self._eval.append(asdict(row))
        if row.loss is not None:
            if self._writer:
                self._writer.add_scalar("eval/loss", row.loss, row.step)
            self.say(f"step {row.step}/{self.total_steps}  held-out loss {row.loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def sync(self) -> None:
        """Flush the rows to the disk. Call this before a checkpoint, whose steps must all have their row."""
        self._train.sync()
        self._eval.sync()

    def close(self) -> None:
        """Close the files and the progress bar."""
        self._bar.close()
        self._train.close()
        self._eval.close()
        if self._writer:
            self._writer.close()

    def _left(self, step: int) -> str:
        return clock(self._seconds / self._done * (self.total_steps - step))


class SilentLog:
    """Takes the place of :class:`RunLog` in ranks other than 0: it writes nothing and shows nothing."""

    def evaluations(self) -> list[EvalRow]:
        """Return nothing: rank 0 knows the evaluations."""
        return []

    def step(self, step: int, stats: StepStats) -> None:
        """Leave an optimizer step to rank 0."""

    def evaluation(self, row: EvalRow) -> None:
        """Leave an evaluation to rank 0."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def notice(text: str) -> None:
    """Print a line for the user before there is a progress bar; ranks other than 0 print nothing."""
    if launch.is_first():
        print(text, file=sys.stderr, flush=True)


def memory_now() -> dict[str, int]:
    """Return the peak of host memory and, with a GPU, the peak of torch's allocator, in bytes."""
    host = {"peak_rss_bytes": host_memory.peak_resident_bytes()}
    if not torch.cuda.is_available():
        return host
    return {"peak_allocated_bytes": torch.cuda.max_memory_allocated()} | host


def clock(seconds: float) -> str:
    """Format seconds as ``1:02:03`` or ``2:03``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _summary_writer(folder: Path, first_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            Problem(field="tensorboard", value=True, why="it is not installed", remedy="pip install tensorboard")
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)
