"""Makes everything that the training loop needs from a config, in an order that finds cheap mistakes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune import launch
from finetune.config import yaml_file
from finetune.data.batches import load_examples, total_steps
from finetune.data.encode import told_of_no_end
from finetune.disk import checkpoint, durable
from finetune.disk.resume import RunFacts, check_settings, compare, fingerprint, package_versions
from finetune.disk.run_folder import RunFolder
from finetune.disk.run_log import notice
from finetune.disk.state import Tree, seed_everything
from finetune.errors import ConfigError, OutputError, Problem
from finetune.kernels.choice import check_kernels, set_kernels
from finetune.kernels.packed_attention import keep_rows_apart
from finetune.model.checks import check_assumptions, why_the_split_matters
from finetune.model.embeddings import (
    check_question,
    check_tables,
    padded_within,
    tables_of,
    told_of_new_rows,
    told_of_unknown_tokens,
)
from finetune.model.load import attach_adapter, load_base, load_tokenizer, resolve_device
from finetune.model.parts import wholes
from finetune.model.recompute import usable
from finetune.model.settle import settled
from finetune.model.targets import coverage
from finetune.model.whole import told_of_unused_weights
from finetune.training import ranks
from finetune.training.host_base import require_host_memory
from finetune.training.optim import rounded_away
from finetune.training.sample import Question, choose_question
from finetune.training.sharded import optimizer_of, restore, spread
from finetune.training.split import Split, as_recorded, chosen_split, keep_gradients

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from finetune.config.settings import RunConfig
    from finetune.data.batches import DataSplit
    from finetune.disk.checkpoint import Checkpoint
    from finetune.training.oom import Holdings


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A run that is ready to train."""

    config: RunConfig
    tokenizer: Any
    model: PreTrainedModel
    data: DataSplit
    optimizer: torch.optim.Optimizer
    facts: RunFacts
    question: Question | None
    layers: tuple[str, ...]
    """Lines that say which layers got an adapter, and which got none and why; empty if all weights are trained."""
    total_steps: int
    start_step: int
    """Steps already done by the run that is resumed; 0 for a new one."""
    random_state: Tree | None
    """State of this rank's random generators after ``start_step`` steps; None for a new run, and for a new rank."""


def prepare(config: RunConfig, holdings: Holdings) -> Setup:
    """Make everything that the loop needs.

    The data are loaded before the model, so that a bad row is reported in seconds. A resumed run is compared with its
    checkpoint before its first step.

    Args:
        config: a validated config.
        holdings: gets the settings with the split that the run takes, and the model and the optimizer when they are
            made, for the message of an out-of-memory failure.

    Raises:
        ConfigError: a setting cannot be used, or differs from the resumed run's.
        DataError: a row cannot be used, or has a token or a position that the model does not have.
        ModelError: the base cannot be loaded as configured.
        OutputError: the output folder holds another run.
        CheckpointError: there are checkpoints, and none is sound.
    """
    run = RunFolder(config.output.output)
    check_kernels(config.train.kernels, resolve_device(config.model))
    with ranks.first_alone():
        begun = _begin(config, run)
    config, found = begun.config, begun.found
    ranks.require_shares(config)  # a resumed run may have another split than the settings
    holdings.config = config
    notice(str(begun.data.stats))
    require_host_memory(config)
    base = load_base(config.model)
    holdings.model = base
    data, question = _checked_against(base, begun)
    base_fingerprint = fingerprint(base, wholes(base))
    model, layers = _adapted(base, config, holdings)
    holdings.config = config = _recomputing(model, config)
    _check_model(model, config)
    optimizer = optimizer_of(model, config.train)
    holdings.optimizer = optimizer
    _tell(rounded_away(model.parameters(), config.train))
    split = chosen_split(model, data.train, config) if found is None else Split(config=config)
    holdings.config = config = split.config
    _tell(split.note)
    _tell(keep_gradients(model, data.train, split))
    facts = _facts(config, model, base=base_fingerprint, data=data.train.fingerprint)
    done = found.step if found else 0
    ranks.require_same(model=facts.base, data=facts.data, output=f"a run with {done} steps done")
    steps = total_steps(data.train, config.train)
    if found is not None:
        _require_steps_left(found.step, steps, config)
        _restore(found, facts, model, optimizer)
    if begun.earlier:  # from here on nothing is refused, so the earlier run may be replaced
        if not config.output.resume:
            _remove(begun.earlier)
        # The settings are written as they were given: a chosen split would mix with the flags of a resumption.
        durable.write_text(run.config, yaml_file.dump(begun.asked))
    return Setup(
        config=config,
        tokenizer=begun.tokenizer,
        model=model,
        data=data,
        optimizer=optimizer,
        facts=facts,
        question=question,
        layers=layers,
        total_steps=steps,
        start_step=done,
        random_state=_own_random_state(found) if found else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A run before its base is loaded."""

    config: RunConfig
    """The settings; those of a resumed run have the choices that it began with."""
    asked: RunConfig
    """The settings as they were given."""
    earlier: list[Path]
    """What an earlier run left in the output folder."""
    found: Checkpoint | None
    """The checkpoint from which the run continues."""
    tokenizer: Any
    data: DataSplit


def _begin(config: RunConfig, run: RunFolder) -> _Begun:
    """Look for an earlier run and its checkpoint, and load tokenizer and data."""
    config = asked = settled(config)
    earlier = _earlier_run(run) if launch.is_first() else []
    if launch.is_first() and not earlier:
        durable.write_text(run.config, yaml_file.dump(config))
    found = _checkpoint(config, earlier)
    if found is not None:
        config = as_recorded(config, found.facts["settings"])
    _set_threads(config, found)
    seed_everything(config.train.seed)
    tokenizer = load_tokenizer(config.model)
    data = load_examples(config.data, tokenizer, seed=config.train.seed)
    return _Begun(config=config, asked=asked, earlier=earlier, found=found, tokenizer=tokenizer, data=data)


def _checked_against(base: PreTrainedModel, begun: _Begun) -> tuple[DataSplit, Question | None]:
    """Check that the base has every token and position of the rows; return the data, and the question to ask."""
    tokenizer, tables = begun.tokenizer, tables_of(base)
    check_tables(tables, begun.data, tokenizer, begun.config)
    data, padding = padded_within(begun.data, tables, tokenizer)
    question = choose_question(begun.config.output, tokenizer, data.held_out)
    if question is not None:
        check_question(tables, question.input_ids, tokenizer)
    of_model = (told_of_unused_weights(base), told_of_unknown_tokens(tables, tokenizer), told_of_new_rows(base))
    _tell(told_of_no_end(tokenizer), *of_model, padding)
    return data, question


def _adapted(base: PreTrainedModel, config: RunConfig, holdings: Holdings) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Attach the adapter, spread the model over the ranks, and set its kernels; return it and :attr:`Setup.layers`."""
    model = attach_adapter(base, config.adapter, seed=config.train.seed, saved=config.model.model)
    holdings.model = model
    layers = () if config.adapter.full else coverage(model, config.adapter).lines()
    spread(model, config)
    _tell(*layers, *set_kernels(model, config.train.kernels))
    return model, layers


def _recomputing(model: PreTrainedModel, config: RunConfig) -> RunConfig:
    """Return the settings with a value of ``--checkpointing`` that this model can use."""
    checkpointing, note = usable(model, config.train.checkpointing)
    _tell(note)
    return yaml_file.replace(config, {"checkpointing": checkpointing})


def _check_model(model: PreTrainedModel, config: RunConfig) -> None:
    """Choose how packed rows are kept apart, and check what training assumes of the model."""
    apart = keep_rows_apart(model) if config.data.packing else None
    check_assumptions(model, packing=config.data.packing)
    _tell(apart)


def _facts(config: RunConfig, model: PreTrainedModel, *, base: str, data: str) -> RunFacts:
    """Return what a resumed run must match, with the fingerprints of the base and of the data."""
    return RunFacts(
        settings=yaml_file.json_values(config),
        threads=torch.get_num_threads(),
        device=next(model.parameters()).device.type,
        base=base,
        data=data,
        versions=package_versions(),
        ranks=launch.size(),
    )


def _tell(*notes: str | None) -> None:
    for note in notes:
        if note:
            notice(note)


def _own_random_state(found: Checkpoint) -> Tree | None:
    states = [found.state["random"], *found.state.get("random_of_others", ())]
    return states[launch.rank()] if launch.rank() < len(states) else None


def _earlier_run(run: RunFolder) -> list[Path]:
    """Remove the temporary files of a killed process, and return what else an earlier run left in the folder."""
    durable.remove_leftovers(run.path)
    durable.remove_leftovers(run.checkpoints)
    return [path for path in run.written() if _holds_something(path)]


def _checkpoint(config: RunConfig, earlier: list[Path]) -> Checkpoint | None:
    """Return the checkpoint from which the run continues; None for a run that starts at step 0."""
    output = config.output.output
    if not config.output.resume:
        if earlier and not config.output.overwrite:
            names = ", ".join(path.name for path in earlier)
            raise OutputError(
                f"output = {str(output)!r}: holds a run already ({names}); continue it with --resume, "
                "replace it by --overwrite, or name another folder with --output"
            )
        return None
    found, refused = checkpoint.newest(RunFolder(output).checkpoints)
    if found is not None:
        recorded = found.facts["settings"]
        check_settings(recorded, yaml_file.json_values(as_recorded(config, recorded)))
    for refusal in refused:
        notice(f"{refusal}; going on from the one before")
    notice(f"resuming {output} after step {found.step}" if found else f"no checkpoint in {output}: starting at step 0")
    return found


def _remove(paths: list[Path]) -> None:
    for path in paths:
        durable.remove_folder(path) if path.is_dir() else path.unlink()


def _holds_something(path: Path) -> bool:
    """Return whether there is more than the empty file or folder of a run that failed before its first step."""
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def _set_threads(config: RunConfig, found: Checkpoint | None) -> None:
    wanted = config.train.threads or (found.facts["threads"] if found else 0)
    if wanted and wanted != torch.get_num_threads():
        if found and not config.train.threads:
            notice(f"this run began with {wanted} CPU threads, and continues with them")
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
    restore(model, optimizer, found.state)
