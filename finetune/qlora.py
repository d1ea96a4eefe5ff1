"""``python -m finetune.qlora``: parse -> prepare -> fit -> write the result.

The story in one sitting. Each step is a module of its own: ``cli`` (flags and YAML), ``prepare`` (data, model, adapter,
optimizer, and what a resumed run restores), ``loop`` (steps, evaluations, checkpoints), ``result`` (adapter, card,
summary, merged model). Heavy imports wait until the settings are known to be right.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from finetune import cli
from finetune.config import yaml_file
from finetune.config.validate import validate
from finetune.errors import ConfigError, ExitCode, FinetuneError, RunInterruptedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.config.settings import RunConfig
    from finetune.training.card import Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and say in one message what went wrong if something did.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit code, see :class:`finetune.errors.ExitCode`.
    """
    try:
        config = cli.parse(sys.argv[1:] if argv is None else argv)
        if config.dry.print_config:
            sys.stdout.write(yaml_file.dump(config))
        elif config.dry.dry_run or config.dry.fit:
            return int(importlib.import_module("finetune.dryrun.command").main(config))
        else:
            _settle_libraries()
            summary = run(config)
            from finetune.training.result import report

            print(report(summary))
    except ConfigError as error:
        print(cli.explain(error), file=sys.stderr)
        return error.exit_code
    except FinetuneError as error:
        print(f"finetune.qlora: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def run(config: RunConfig) -> Summary:
    """Fine-tune as configured, and leave the result in ``config.output.output``.

    Returns:
        The figures of the run, which ``summary.json`` holds too.

    Raises:
        FinetuneError: one of its kinds, each with the remedy in its message; what was saved is sound.
    """
    validate(config)
    from finetune.disk.durable import run_lock
    from finetune.training.loop import fit
    from finetune.training.oom import Holdings, explained
    from finetune.training.prepare import prepare
    from finetune.training.result import write_result
    from finetune.training.stop import Stop, StopRequested

    holdings = Holdings()
    try:
        with run_lock(config.output.output), Stop().listening() as stop, explained(config, holdings):
            setup = prepare(config, holdings)
            evaluations = fit(setup, stop)
            return write_result(setup, evaluations)
    except StopRequested:
        raise RunInterruptedError(
            f"stopped before the first step or after the last; what was saved is sound, go on with: {cli.PROG} "
            f"--output {config.output.output} --resume"
        ) from None


def _settle_libraries() -> None:
    """Keep other libraries' bars and advice out of a log, and their idle threads off the cores.

    Threads that wait by spinning make a run several times slower as soon as anything else wants the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks, at import, for optional kernels
    # peft 0.21 asks transformers 5.23 for a flag by its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
