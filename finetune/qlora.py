"""``python -m finetune.qlora``: parse -> prepare -> fit -> write the result.

This module shows a whole run from start to end. Each stage has a module of its own: ``cli`` (flags and YAML),
``prepare`` (data, model, adapter, optimizer, and the state that a resumed run restores), ``loop`` (steps, evaluations,
checkpoints) and ``result`` (adapter, model card, summary, merged model). Torch and the other heavy packages are
imported only after the settings have been checked, so that a mistake in them is reported at once.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from finetune import cli, launch
from finetune.config import yaml_file
from finetune.config.split import with_batch
from finetune.config.validate import validate
from finetune.errors import ConfigError, ExitCode, FinetuneError, OtherRankError, Problem, RunInterruptedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import RunConfig
    from finetune.training.card import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and print one message if the run fails.

    Under ``torchrun`` every rank runs this. Rank 0 prints; the rank that fails first prints why.

    Args:
        argv: the arguments after the program's name. None takes the arguments of this process.

    Returns:
        The exit code, see :class:`finetune.errors.ExitCode`.
    """
    try:
        with launch.said_once():
            config = _parsed(sys.argv[1:] if argv is None else argv)
        if config.dry.print_config:
            sys.stdout.write(yaml_file.dump(config) if launch.is_first() else "")
            return ExitCode.OK
        if config.model.shard:
            _require_sharding()
            _let_segments_grow()
        if config.dry.dry_run or config.dry.fit:
            if not launch.is_first():  # rank 0 measures, prints and writes
                return ExitCode.OK
            return int(importlib.import_module("finetune.dryrun.command").main(config))
        _settle_libraries()
        summary = run(config)
        if summary is not None:
            from finetune.training.result import report

            print(report(summary))
    except OtherRankError as error:
        return error.exit_code
    except FinetuneError as error:
        said = cli.explain(error) if isinstance(error, ConfigError) else f"finetune.qlora{launch.who()}: {error}"
        print(said, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def _parsed(argv: Sequence[str]) -> RunConfig:
    """Parse the command line. Ranks other than 0 leave the message to rank 0, which sees the same mistake."""
    try:
        return cli.parse(argv)
    except ConfigError as error:
        raise error if launch.is_first() else OtherRankError(str(error), error.exit_code) from None


def run(config: RunConfig) -> Summary | None:
    """Fine-tune as configured, and write the result into ``config.output.output``.

    Returns:
        The figures of the run. ``summary.json`` holds the same figures. None in ranks other than 0, which write
        nothing.

    Raises:
        FinetuneError: the run failed. The subclass tells the cause and the message the remedy; the checkpoints that
            were saved before are sound.
    """
    validate(config)
    config = with_batch(config)
    from finetune.training.ranks import joined

    with joined(config):
        return _run(config)


def _run(config: RunConfig) -> Summary | None:
    from finetune.disk.durable import run_lock
    from finetune.training.loop import fit
    from finetune.training.oom import Holdings, explained
    from finetune.training.prepare import prepare
    from finetune.training.result import write_result
    from finetune.training.sharded import whole_model
    from finetune.training.stop import Stop, StopRequested

    holdings = Holdings()
    lock = run_lock(config.output.output) if launch.is_first() else contextlib.nullcontext()
    try:
        with lock, Stop().listening() as stop, explained(config, holdings):
            setup = prepare(config, holdings)
            evaluations = fit(setup, stop)
            whole = whole_model(setup.model)
            return write_result(setup, evaluations, whole) if launch.is_first() else None
    except StopRequested:
        raise RunInterruptedError(
            f"stopped before the first step or after the last; what was saved is sound, continue with: {cli.PROG} "
            f"--output {config.output.output} --resume"
        ) from None


def _settle_libraries() -> None:
    """Silence the progress bars and warnings of other libraries, and make idle OpenMP threads sleep.

    By default an idle OpenMP thread spins: it keeps its core busy while it waits. That makes a run several times slower
    as soon as another program uses the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads this when torch is imported
    if launch.size() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is gone is told once, by this program
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns that optional kernels are missing
    # peft 0.21 reads a flag of transformers 5.23 under the flag's old name, which warns.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _require_sharding() -> None:
    """Refuse a torch whose ``fully_shard`` cannot leave the adapter whole, before a base is loaded.

    Raises:
        ConfigError: torch is older than 2.7.
    """
    installed = importlib.metadata.version("torch")
    if tuple(int(number) for number in installed.split(".")[:2]) < (2, 7):
        why = f"it needs torch 2.7 or newer, and this is torch {installed}"
        raise ConfigError(Problem(field="shard", value=True, why=why, remedy="update torch, or use --no-shard"))


def _let_segments_grow() -> None:
    """Make torch's allocator enlarge its segments, unless the user has chosen how it works.

    Layers of a sharded base are gathered and freed over and over, which fragments segments of a fixed size.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read when the allocator is first used


if __name__ == "__main__":
    sys.exit(main())
