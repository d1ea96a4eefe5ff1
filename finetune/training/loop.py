"""Runs the training loop: steps, evaluations, log rows and checkpoints. Config, data and seed determine its result."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from finetune import launch
from finetune.data.batches import batches, longest_window, windows
from finetune.disk import checkpoint
from finetune.disk.run_folder import RunFolder
from finetune.disk.run_log import EvalRow, RunLog, SilentLog, StepStats
from finetune.disk.state import random_state, restore_random_state, seed_everything
from finetune.errors import RunInterruptedError, TrainingError
from finetune.model.names import names_of
from finetune.model.parts import is_sharded
from finetune.model.whole import not_finite
from finetune.training import ranks
from finetune.training.accumulate import window_gradients
from finetune.training.optim import compile_kernels, state_bytes
from finetune.training.sample import answer
from finetune.training.sharded import trained, trained_here, whole_state
from finetune.training.step import EvalStats, evaluate, train_step
from finetune.training.stop import Stop, StopRequested

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune.training.prepare import Setup


def fit(setup: Setup, stop: Stop) -> list[EvalRow]:
    """Train from ``setup.start_step`` to ``setup.total_steps``, and evaluate before, during and after training.

    Returns:
        All evaluations of the run in order, including those before an interruption.

    Raises:
        RunInterruptedError: a signal came; the finished steps are saved.
        TrainingError: no gradient reaches the adapter, or the loss is not a number.
        WriteError: the disk is full; the earlier checkpoints are untouched.
    """
    output = setup.config.output
    log = _log(setup)
    with contextlib.closing(log), stop.deferred(setup.model.get_input_embeddings()):
        loop = _Loop(setup, stop, log)
        try:
            loop.run()
        except StopRequested:
            where = loop.save()
            raise RunInterruptedError(
                f"stopped after step {loop.step} of {setup.total_steps}, saved in {where}; continue with: "
                f"python -m finetune.qlora --output {output.output} --resume"
            ) from None
        return log.evaluations()


def _log(setup: Setup) -> RunLog | SilentLog:
    output = setup.config.output
    if not launch.is_first():
        return SilentLog()
    return RunLog(
        RunFolder(output.output),
        start_step=setup.start_step,
        total_steps=setup.total_steps,
        tensorboard=output.tensorboard,
    )


class _Loop:
    """The state of a loop between two steps: the number of steps done, and the random state after them."""

    def __init__(self, setup: Setup, stop: Stop, log: RunLog | SilentLog) -> None:
        self.setup, self.stop, self.log = setup, stop, log
        self.step = setup.start_step
        if setup.random_state is None:
            seed_everything(ranks.seed_of(setup.config.train.seed, done=setup.start_step))
        else:
            restore_random_state(setup.random_state)
        self.random = random_state()
        self.saved_step = setup.start_step or None

    def run(self) -> None:
        setup, output = self.setup, self.setup.config.output
        known = ranks.of_first([row.step for row in self.log.evaluations()])
        if self.step not in known and self._due(output.eval_every):
            self._evaluate()
        if self.step < setup.total_steps:
            self._try_longest()
        for window in windows(setup.data.train, setup.config.train, start_step=self.step):
            self._train(window)
            if self._due(output.save_every):
                self.save()
            if self._due(output.eval_every):
                self._evaluate()

    def save(self) -> Any:
        """Write a checkpoint of the finished steps, unless it exists already."""
        setup, output = self.setup, self.setup.config.output
        folder = RunFolder(output.output).checkpoints
        if self.saved_step != self.step:
            random, *of_others = ranks.gathered(self.random)
            whole = whole_state(setup.model, setup.optimizer)
            if launch.is_first():
                self.log.sync()
                state = whole | {"random": random, "random_of_others": of_others}
                checkpoint.save(folder, step=self.step, facts=asdict(setup.facts), state=state, keep=output.keep)
            ranks.wait_for_all()  # a rank that ends before rank 0 has written would end rank 0 too
            self.saved_step = self.step
        return folder

    def _due(self, every: int) -> bool:
        """Return whether an action is due that happens at the start, at the end, and every ``every`` steps."""
        return self.step in (0, self.setup.total_steps) or (every > 0 and self.step % every == 0)

    def _train(self, window: Any) -> None:
        if ranks.any_of(self.stop.requested):
            raise StopRequested
        setup, own = self.setup, ranks.share(window)
        stats: StepStats = train_step(
            setup.model, own, setup.optimizer, setup.config.train, step=self.step, total_steps=setup.total_steps
        )
        if not (math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)):
            broken = not_finite(setup.model) if self.step == 0 else None
            remedy = "Lower --learning-rate, or use --compute-dtype fp32 or bf16"
            if broken is not None:  # nothing was updated yet, so the values were in the files
                remedy = f"The model came with values in {broken} that are infinite or no numbers: download it again"
            raise TrainingError(
                f"step {self.step + 1}: the loss is {stats.loss}, the gradient's norm {stats.grad_norm}. {remedy}; the "
                "checkpoints before this step are sound"
            )
        self.step += 1
        self.random = random_state()
        self.log.step(self.step, stats)

    def _evaluate(self) -> None:
        setup, output = self.setup, self.setup.config.output
        with self._undisturbed():
            held_out = batches(setup.data.held_out, micro_batch=setup.config.train.micro_batch)
            stats = _of_all(evaluate(setup.model, ranks.share(held_out), setup.config.train))
            ends = self.step in (0, setup.total_steps)
            text = (
                answer(setup.model, setup.tokenizer, setup.question, max_tokens=output.answer_tokens)
                if setup.question is not None and ends and (launch.is_first() or is_sharded(setup.model))
                else None
            )
        self.log.evaluation(
            EvalRow(
                step=self.step,
                loss=stats.loss if stats.targets else None,
                targets=stats.targets,
                question=setup.question.text if text is not None and setup.question else None,
                answer=text,
            )
        )

    def _try_longest(self) -> None:
        """Run the longest batch once and discard it, so that a run that does not fit fails at its start.

        Its gradients also show whether the adapter learns at all. Weights and random generators do not change.

        On a card the first window runs as well, and the optimizer's kernel: its sizes are those of most steps, for
        which kernels are then compiled before the first step.
        """
        setup = self.setup
        with self._undisturbed(), _ballast(setup):
            window = longest_window(setup.data.train, setup.config.train)
            stats = window_gradients(setup.model, window, setup.config.train)
            require_gradients(setup.model, loss=stats.loss)
            setup.model.zero_grad(set_to_none=True)
            if next(setup.model.parameters()).device.type == "cuda":
                compile_kernels(setup.optimizer)
                usual = next(windows(setup.data.train, setup.config.train, start_step=self.step))
                window_gradients(setup.model, ranks.share(usual), setup.config.train)
                setup.model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave the random generators as they were before the block."""
        try:
            yield
        finally:
            restore_random_state(self.random)


def _of_all(own: EvalStats) -> EvalStats:
    """Combine the evaluations of all ranks' shares into one."""
    loss_sum, targets = ranks.summed(own.loss * own.targets if own.targets else 0.0, own.targets)
    return EvalStats(loss=loss_sum / targets if targets else float("nan"), targets=int(targets))


def require_gradients(model: torch.nn.Module, *, loss: float) -> None:
    """Check that a gradient reaches the adapter.

    Args:
        model: after a backward pass.
        loss: the loss of that backward pass. If it is 0 (on a device that only allocates), gradients may be 0 too.

    Raises:
        TrainingError: a ``lora_B`` (with ``--full``, any weight) has no gradient, or all of them are zero.
    """
    parameters = trained(model)
    learners = {name: p for name, p in parameters.items() if "lora_B" in name} or parameters
    without = [name for name, parameter in learners.items() if parameter.grad is None]
    if len(without) == len(learners):
        raise TrainingError(
            f"no gradient reaches any of the {len(learners)} weights that are trained, the first is {without[0]}: the "
            "backward pass of this model does not lead to them. Try --no-checkpointing; where that changes nothing, "
            "the model cannot be trained here"
        )
    if without:
        paths = [
            [name.removeprefix("base_model.model.").partition(".lora_")[0] for name in part]
            for part in _parts(learners)
        ]
        raise TrainingError(
            f"{len(without)} of {len(learners)} adapter matrices get no gradient from the longest rows, the first is "
            f"{without[0]}: the model does not use it for them (some layers only work on longer rows). Use --exclude "
            f"{' '.join(names_of(*paths))}, or try --no-checkpointing"
        )
    if loss > 0 and not _any_gradient(model, learners):
        raise TrainingError(
            "every gradient of the adapter is zero: nothing would be learned. Use --compute-dtype fp32 or bf16, and "
            "look at the data: the loss may be taken on no token"
        )


def _any_gradient(model: torch.nn.Module, parameters: dict[str, torch.nn.Parameter]) -> bool:
    gradients = (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters.values())
    own = any(bool(gradient.any()) for gradient in gradients if gradient is not None)
    return ranks.any_of(own) if is_sharded(model) else own


def _parts(parameters: dict[str, torch.nn.Parameter]) -> tuple[list[str], list[str]]:
    """Return the names of the parameters without a gradient, and of those with one."""
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    return without, [name for name in parameters if name not in without]


@contextlib.contextmanager
def _ballast(setup: Setup) -> Iterator[None]:
    """Hold as much memory as the optimizer state will take, so that the trial step has the peak of later steps."""
    parameters = trained_here(setup.model).values()
    device = next(iter(parameters)).device
    masters = not setup.config.adapter.full
    size = state_bytes(parameters, setup.config.train, masters=masters) if setup.start_step == 0 else 0
    state = torch.empty(size, dtype=torch.uint8, device=device)
    yield
    del state
