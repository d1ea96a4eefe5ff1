"""The commands ``--dry-run`` and ``--fit``.

``--dry-run`` says whether a run fits a card, and ``--fit`` which settings use the card best. Neither needs weights or a
GPU. If --data is a local file, its rows are read and checked against the model's tables, as a run does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import yaml_file
from finetune.config.cards import dry_ranks
from finetune.config.recompute import place_is_open
from finetune.config.settings import EMBEDDED_MODEL, RunConfig
from finetune.config.validate import validate
from finetune.dryrun.card import named_card
from finetune.dryrun.messages import Found, Refusal, Request, Result, Settings, Trial
from finetune.dryrun.report import Outcome, as_json, render, runners_up, save_page
from finetune.dryrun.several import alone, combined, read_results, run_ranks
from finetune.errors import ConfigError, DataError, ExitCode, FinetuneError, ModelError, Problem, WriteError
from finetune.model.settle import settled
from pytest_vram.memory.codec import encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OPEN = ("micro_batch", "seq", "checkpointing", "rank")
"""The settings that ``--fit`` may change. One that the user has set to another value than its default stays. The rows
of a step stay in any case, and ``offload_activations`` is chosen with them if it is ``auto``."""
MARGIN = 0.03
"""Share of the card that ``--fit`` leaves free, because drivers differ, and a desktop may use the same card."""
ROOMY_BYTES = 2**40
"""Memory in bytes of the made-up card on which a run is measured that does not fit the card it is meant for."""


class DryRunError(FinetuneError):
    """The process that takes the steps has failed."""


def main(config: RunConfig) -> int:
    """Carry out ``--dry-run`` or ``--fit``, and print the result.

    Returns:
        The exit code: 0 if the run fits (``--fit``: if any setting does), else 3.

    Raises:
        ConfigError: no card is named and there is no GPU, or the model cannot be found.
        DryRunError: the trial failed for another reason than memory.
    """
    validate(config)
    card = _card(config)
    _refuse_misspelt(config.model.model)
    if Path(config.model.model).expanduser().is_dir():  # a hub model is settled by the process that takes the steps
        config = settled(config)
    if config.dry.fit:
        return _fit(config, card)
    outcome = measure(config, card, over_time=config.dry.html is not None)
    config = outcome.chosen_from(config)
    print(render(config, card, outcome))
    _write(config, card, outcome)
    return ExitCode.OK if outcome.fits else ExitCode.OUT_OF_MEMORY


def measure(config: RunConfig, card: str | None, *, over_time: bool = False) -> Outcome:
    """Take the run's steps on a card, and take them again with :data:`ROOMY_BYTES` if they do not fit.

    What the settings leave open of the split and of the recomputed layers is chosen first, as a run does on that card.

    Args:
        config: the run.
        card: name of the dry GPU; None measures on the GPU of this machine, once.
        over_time: record memory over time as well.
    """
    opened = _leaves_open(config)
    (trial,) = trials(config, [{}], card, over_time=over_time and not opened, choose=opened)
    if opened:
        config = Outcome(trial=trial).chosen_from(config)
        if over_time and trial.fits:  # apart from the trials of the choice, which would be on the page too
            (recorded,) = trials(config, [{}], card, over_time=True)
            trial = dataclasses.replace(recorded, chosen=trial.chosen, note=trial.note)
    if trial.fits or card is None:
        return Outcome(trial=trial)
    (roomy,) = trials(config, [{}], card, total_bytes=ROOMY_BYTES, over_time=over_time)
    return Outcome(trial=trial, roomy=roomy)


def _leaves_open(config: RunConfig) -> bool:
    train = config.train
    return train.split == "auto" or train.checkpointing == "auto" or place_is_open(train)


def trials(
    config: RunConfig,
    changes: Sequence[Settings],
    card: str | None,
    *,
    total_bytes: int | None = None,
    over_time: bool = False,
    choose: bool = False,
) -> list[Trial]:
    """Take the steps of several variants of a run, one after the other. The base model is loaded once for all.

    Args:
        config: the run.
        changes: for each variant, the settings that it changes, by name. Settings of the model may not be among them.
        card: name of the dry GPU; None measures on the GPU of this machine.
        total_bytes: memory of the dry GPU, in place of the card's own; None keeps that.
        over_time: record memory over time as well; for one variant only.
        choose: choose first what the settings leave open of the split and of the recomputed layers.

    Returns:
        One trial for each variant. If the base cannot be loaded, they all are the trial of loading it.
    """
    request = Request(
        kind="run",
        settings=trial_settings(config),
        changes=tuple(changes),
        over_time=over_time,
        choose=choose,
        ranks=dry_ranks(config),
    )
    found = in_trial_process(request, card, total_bytes=total_bytes).trials
    return [*found] * len(changes) if len(found) < len(changes) else [*found]


def in_trial_process(request: Request, card: str | None, *, total_bytes: int | None = None) -> Result:
    """Send a request to a new :mod:`finetune.dryrun.trial_process`, and return its result.

    Args:
        request: what the process is to do.
        card: name of the dry GPU; None measures on the GPU of this machine.
        total_bytes: memory of the dry GPU, in place of the card's own; None keeps that.

    Raises:
        ConfigError: a setting cannot be used with this model, or there is no model of that name.
        DataError: a row of --data cannot be trained on.
        ModelError: the model cannot be trained as configured.
        DryRunError: the process failed in another way; the message has the last lines of its error output.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(encode(request)))
        with _waiting():
            environment = _environment(card, total_bytes, request.ranks)
            files, failure = run_ranks(folder / "request.json", request.ranks, environment)
        result = combined(read_results(files))
    if result is None:
        raise DryRunError(f"the trial of {request.settings['model']}: {failure}")
    if result.refusal is not None:
        raise _error_of(result.refusal, request.settings["model"])
    return result


def _error_of(refusal: Refusal, model: str) -> FinetuneError:
    """Return the error with which the trial process ended."""
    if refusal.kind == "missing":
        return _no_such_model(model, refusal.message)
    if refusal.kind == "data":
        return DataError(refusal.message)
    return ConfigError(*refusal.problems) if refusal.kind == "setting" else ModelError(refusal.message)


def _refuse_misspelt(name: str) -> None:
    """Reject a misspelt shape name at once; otherwise transformers would ask the hub for it, several times.

    Raises:
        ConfigError: the name is not a path, and differs from the name of a shape by a letter or two.
    """
    from finetune.model.shapes import find_shape, near_shapes

    local = Path(name).expanduser().exists() or "/" in name or name == EMBEDDED_MODEL
    if not local and find_shape(name) is None and near_shapes(name, cutoff=0.75):
        raise _no_such_model(name, "")


def _no_such_model(name: str, said: str) -> ConfigError:
    """Return the error for a name that no folder, hub model or shape has. It lists shapes with a similar name."""
    from finetune.model.shapes import SHAPES, near_shapes

    near = near_shapes(name)
    return ConfigError(
        Problem(
            field="model",
            value=name,
            why=f"did you mean {' or '.join(near)}?" if near else said.strip().splitlines()[0],
            remedy=f"name a folder with a config.json, a hub model, or a shape: {', '.join(SHAPES)}",
        )
    )


def trial_settings(config: RunConfig) -> Settings:
    """Return the settings that matter to a trial, as JSON can hold them. A trial always runs on a GPU."""
    sections = {name: section for name, (section, _) in yaml_file.field_types().items()}
    kept = {n: value for n, value in yaml_file.json_values(config).items() if sections[n] not in ("dry", "output")}
    return kept | {"device": "cuda"}


def _write(config: RunConfig, card: str | None, outcome: Outcome) -> None:
    """Write the files that ``--html`` and ``--json`` name. Call this after the result is printed.

    Raises:
        WriteError: a file cannot be written.
    """
    if config.dry.html is None and config.dry.json is None:
        return
    try:
        if config.dry.json is not None:
            config.dry.json.write_text(as_json(command(config), card, outcome))
        if config.dry.html is not None:
            save_page(command(config), outcome, config.dry.html)
    except OSError as error:
        raise WriteError(f"{error.filename} cannot be written: {error.strerror}") from error


def _fit(config: RunConfig, card: str | None) -> int:
    """Search for the best settings, confirm them in a new process, and print the command that uses them."""
    begin = time.perf_counter()
    limit = int(_total(config, card) * (1 - MARGIN))
    now, default = yaml_file.flatten(config), yaml_file.flatten(RunConfig())
    decides = {"micro_batch": "split"}  # the setting that says whether the user has set another one
    opened = [name for name in OPEN if now[decides.get(name, name)] == default[decides.get(name, name)]]
    found, confirmed = _searched(config, card, opened, limit)
    if found.best is None or confirmed is None:
        print(f"no setting of {', '.join(opened) or 'those left open'} fits {card or 'this GPU'}")
        outcome = measure(config, card, over_time=config.dry.html is not None)
        config = outcome.chosen_from(config)
        print(render(config, card, outcome))
        _write(config, card, outcome)
        return ExitCode.OUT_OF_MEMORY
    chosen = yaml_file.replace(config, found.best.settings | {"split": "given"})
    outcome = Outcome(trial=confirmed)
    print(render(chosen, card, outcome))
    print(runners_up(found, dry_ranks(config)))
    print(f"{found.trials} settings tried in {time.perf_counter() - begin:.0f} s. Train with:")
    print(f"  {command(chosen)}")
    _write(chosen, card, outcome)
    return ExitCode.OK


def _searched(config: RunConfig, card: str | None, opened: Sequence[str], limit: int) -> tuple[Found, Trial | None]:
    """Search for the best settings, and measure them in a new process.

    The search tries many settings over one loaded base, where the allocator's segments are arranged differently than
    after loading. If what it found needs more than the limit in a new process, the search starts again with a limit
    that is lower by as much.

    Returns:
        What was found, and the trial in the new process; None in its place if nothing fits.
    """
    settings, aim, ranks = trial_settings(config), limit, dry_ranks(config)
    # A rank whose memory runs out would end the search of all ranks, so that several search on larger cards.
    total = ROOMY_BYTES if ranks > 1 else None
    while True:
        request = Request(kind="search", settings=settings, open_settings=tuple(opened), limit_bytes=aim, ranks=ranks)
        found = in_trial_process(request, card, total_bytes=total).found
        if found is None or found.best is None:
            return found or Found(best=None, trials=0), None
        chosen = yaml_file.replace(config, found.best.settings)
        (confirmed,) = trials(chosen, [{}], card, over_time=config.dry.html is not None)
        if confirmed.fits and confirmed.peak_device <= limit:
            return found, confirmed
        aim -= max(confirmed.peak_device - limit, int(MARGIN * limit))


def command(config: RunConfig) -> str:
    """Return the command line of a run, with a flag for each setting that differs from its default."""
    default = yaml_file.flatten(RunConfig())
    sections = {name: section for name, (section, _) in yaml_file.field_types().items()}
    changed = {
        name: value
        for name, value in yaml_file.flatten(config).items()
        if value != default[name] and sections[name] != "dry"
    }
    if "micro_batch" in changed:
        changed.pop("split", None)  # the flag says it
    if config.train.batch is not None:
        changed.pop("accumulation", None)  # it follows from the batch, and the two flags together are refused
    ranks = dry_ranks(config)
    start = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    return " ".join([f"{start} -m finetune.qlora", yaml_file.as_flags(changed)]).rstrip()


def _card(config: RunConfig) -> str | None:
    """Return the name of the card that ``--gpu`` asks for; None for the GPU, real or dry, that this process sees.

    Raises:
        ConfigError: no card is named, and there is no GPU here, or it cannot be used for this.
    """
    from pytest_vram.drygpu import is_active, real_gpu_present

    if config.dry.gpu is None and config.dry.fit and dry_ranks(config) > 1:
        why = "a search over several cards needs dry ones, because on real cards a setting that is too large ends it"
        raise ConfigError(Problem(field="gpu", value=None, why=why, remedy="name a card: --gpu rtx-4080"))
    if config.dry.gpu is None:
        if is_active() or real_gpu_present():
            return None
        raise ConfigError(
            Problem(
                field="gpu",
                value=None,
                why="there is no GPU here to measure on",
                remedy="name a card: --gpu rtx-4080 (`python -m pytest_vram cards` lists them)",
            )
        )
    return named_card(config.dry.gpu).name


def _total(config: RunConfig, card: str | None) -> int:
    if card is not None:
        from pytest_vram.drygpu import find_card

        return find_card(card).total_bytes
    (trial,) = trials(config, [{}], None)
    return trial.total


def _environment(card: str | None, total_bytes: int | None, count: int) -> dict[str, str]:
    if card is None:
        return alone()
    from pytest_vram.drygpu import environment
    from pytest_vram.drygpu.process.startup import inherited
    from pytest_vram.errors import VramError

    try:
        env = environment(card, count=count, total_bytes=total_bytes, replace_real_gpu=True, base=alone())
    except VramError as error:
        raise DryRunError(f"the dry GPU cannot be started: {error}") from error
    return {**env, **inherited(env), "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Show on a terminal that the steps are being taken."""
    if sys.stderr.isatty():
        print("taking the steps on a dry GPU ...", end="\r", file=sys.stderr, flush=True)
    yield
    if sys.stderr.isatty():
        print(" " * 40, end="\r", file=sys.stderr, flush=True)
