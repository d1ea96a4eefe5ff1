"""From a config to everything that the loop needs, in the order in which mistakes are cheapest to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune import checkpoint, configfile, durable
from finetune.ask import Question, choose_question
from finetune.assumptions import check_assumptions, why_the_split_matters
from finetune.cli import CONFIG_FILE
from finetune.data import load_examples, total_steps
from finetune.errors import ConfigError, OutputError, Problem
from finetune.kernels import check_kernels, set_kernels
from finetune.model import attach_adapter, load_base, load_tokenizer, resolve_device
from finetune.optim import load_optimizer_state, make_optimizer, rounded_away
from finetune.resume import RunFacts, check_settings, compare, fingerprint, package_versions, settings_of
from finetune.runlog import EVAL_FILE, TENSORBOARD_FOLDER, TRAIN_FILE, notice
from finetune.state import Tree, seed_everything

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from finetune.checkpoint import Checkpoint
    from finetune.config import RunConfig
    from finetune.data import DataSplit
    from finetune.oom import Holdings

CHECKPOINTS, ADAPTER, FULL_MODEL, MERGED = "checkpoints", "adapter", "model", "merged"
SUMMARY_FILE = "summary.json"
_WRITTEN = (CHECKPOINTS, ADAPTER, FULL_MODEL, MERGED, TENSORBOARD_FOLDER)
_WRITTEN_FILES = (SUMMARY_FILE, TRAIN_FILE, EVAL_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run, ready to train."""

    config: RunConfig
    tokenizer: Any
    model: PreTrainedModel
    data: DataSplit
    optimizer: torch.optim.Optimizer
    facts: RunFacts
    question: Question | None
    total_steps: int
    start_step: int
    """Steps already done by the run that is resumed; 0 for a new one."""
    random_state: Tree | None
    """State of the random generators after ``start_step`` steps; None for a new run."""


def prepare(config: RunConfig, holdings: Holdings) -> Setup:
    """Make everything that the loop needs.

    The data come before the model, so that a bad row is told in seconds. A resumed run is held against the one it
    resumes before its first step.

    Args:
        config: a validated config.
        holdings: is told what is held as it is made, for the message of an out-of-memory failure.

    Raises:
        ConfigError: a setting cannot be used, or differs from the resumed run's.
        DataError: a row cannot be used.
        ModelError: the base cannot be loaded as configured.
        OutputError: the output folder holds another run.
        CheckpointError: there are checkpoints, and none is sound.
    """
    output = config.output.output
    check_kernels(config.train.kernels, resolve_device(config.model))
    earlier = _earlier_run(output)
    if not earlier:
        durable.write_text(output / CONFIG_FILE, configfile.dump(config))
    found = _checkpoint(config, earlier)
    _set_threads(config, found)
    seed_everything(config.train.seed)
    tokenizer = load_tokenizer(config.model)
    data = load_examples(config.data, tokenizer, seed=config.train.seed)
    notice(str(data.stats))
    base = load_base(config.model)
    holdings.model = base
    base_fingerprint = fingerprint(base)
    model = attach_adapter(base, config.adapter, seed=config.train.seed)
    holdings.model = model
    for line in set_kernels(model, config.train.kernels):
        notice(line)
    check_assumptions(model, packing=config.data.packing)
    optimizer = make_optimizer(model.parameters(), config.train)
    holdings.optimizer = optimizer
    if note := rounded_away(model.parameters(), config.train):
        notice(note)
    facts = RunFacts(
        settings=settings_of(config),
        threads=torch.get_num_threads(),
        device=next(model.parameters()).device.type,
        base=base_fingerprint,
        data=data.train.fingerprint,
        versions=package_versions(),
    )
    steps = total_steps(data.train, config.train)
    if found is not None:
        _require_steps_left(found.step, steps, config)
        _restore(found, facts, model, optimizer)
    if earlier:  # only now, when nothing can be refused any more, is anything of it replaced
        if not config.output.resume:
            _remove(output, earlier)
        durable.write_text(output / CONFIG_FILE, configfile.dump(config))
    return Setup(
        config=config,
        tokenizer=tokenizer,
        model=model,
        data=data,
        optimizer=optimizer,
        facts=facts,
        question=choose_question(config.output, tokenizer, data.held_out),
        total_steps=steps,
        start_step=found.step if found else 0,
        random_state=found.state["random"] if found else None,
    )


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _earlier_run(output: Path) -> list[str]:
    """What an earlier run left in the folder, the rest of a killed process cleared away."""
    durable.remove_leftovers(output)
    durable.remove_leftovers(output / CHECKPOINTS)
    return [name for name in (*_WRITTEN, *_WRITTEN_FILES) if _holds_something(output / name)]


def _checkpoint(config: RunConfig, earlier: list[str]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run that starts at step 0."""
    output = config.output.output
    if not config.output.resume:
        if earlier and not config.output.overwrite:
            raise OutputError(
                f"output = {str(output)!r}: holds a run already ({', '.join(earlier)}); go on with it by --resume, "
                "replace it by --overwrite, or name another folder with --output"
            )
        return None
    found, refused = checkpoint.newest(output / CHECKPOINTS)
    if found is not None:
        check_settings(found.facts["settings"], settings_of(config))
    for refusal in refused:
        notice(f"{refusal}; going on from the one before")
    notice(f"resuming {output} after step {found.step}" if found else f"no checkpoint in {output}: starting at step 0")
    return found


def _remove(output: Path, names: list[str]) -> None:
    for name in names:
        (output / name).unlink() if name in _WRITTEN_FILES else durable.remove_folder(output / name)


def _holds_something(path: Path) -> bool:
    """Whether there is more than the empty file or folder that a run leaves which failed before its first step."""
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def _set_threads(config: RunConfig, found: Checkpoint | None) -> None:
    wanted = config.train.threads or (found.facts["threads"] if found else 0)
    if wanted and wanted != torch.get_num_threads():
        if found and not config.train.threads:
            notice(f"this run began with {wanted} CPU threads, and goes on with them")
        torch.set_num_threads(wanted)


def _require_steps_left(done: int, total: int, config: RunConfig) -> None:
    if done > total:
        field, value = (
            ("max_steps", config.train.max_steps) if config.train.max_steps else ("epochs", config.train.epochs)
        )
        remedy = f"ask for {done} steps or more, or start a new run with another --output"
        raise ConfigError(Problem(field=field, value=value, why=f"{done} steps are done already", remedy=remedy))


def _restore(found: Checkpoint, facts: RunFacts, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for note in compare(RunFacts(**found.facts), facts, split_matters=why_the_split_matters(model)):
        notice(note)
    weights = found.state["weights"]
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(weights[name])
    load_optimizer_state(optimizer, found.state["optimizer"])
