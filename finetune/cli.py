"""Turns flags and YAML into one checked RunConfig.

It imports neither torch nor transformers, which take seconds, so that a mistake is reported at once.
"""

from __future__ import annotations

import functools
import itertools
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import docstring_parser
import tyro

from finetune.config import recompute, yaml_file
from finetune.config.settings import DEMO, RunConfig
from finetune.config.split import expanded, with_batch
from finetune.config.validate import validate
from finetune.disk.run_folder import RunFolder
from finetune.errors import ConfigError, ExitCode, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

PROG = "python -m finetune.qlora"

_DESCRIPTION = """\
Fine-tune a causal language model with QLoRA: the base model is quantized and frozen, and an adapter is trained on it
with exact gradients.

Usage: python -m finetune.qlora [CONFIG.yaml] [--field value ...]

CONFIG.yaml uses the same names as the flags, one `name: value` on each line; a flag overrides the file. Without --model
and --data the demo runs: it trains the embedded model on the embedded data (its settings are at the end of this text).
"""


def parse(argv: Sequence[str]) -> RunConfig:
    """Turn the command line into a checked config.

    A flag overrides the YAML file, and the file overrides the starting values: the defaults, or the settings of the
    demo, or with ``--resume`` the settings that the run has recorded.

    Args:
        argv: the arguments, without the program's name.

    Raises:
        ConfigError: a setting is unknown or cannot be used.
        SystemExit: 2 for a flag that cannot be parsed, with tyro's explanation; 0 after ``--help``.
    """
    flags = recompute.expanded(expanded(argv))
    settings: dict[str, Any] = {}
    if flags and not flags[0].startswith("-"):
        settings = yaml_file.load(Path(flags.pop(0)))
    config = _parse_flags(flags, yaml_file.replace(RunConfig(), settings))
    if config.embedded:
        # The demo may overwrite its own folder only, never one that the user named.
        own_folder = config.output.output != RunConfig().output.output
        preset = yaml_file.replace(DEMO, {"overwrite": DEMO.output.overwrite and not own_folder})
        config = _parse_flags(flags, yaml_file.replace(preset, settings))
    recorded = RunFolder(config.output.output).config
    if config.output.resume and recorded.is_file():
        before = yaml_file.replace(RunConfig(), yaml_file.load(recorded))
        here = {"output": config.output.output, "resume": True}
        config = _parse_flags(flags, yaml_file.replace(before, settings | here))
    validate(config)
    return with_batch(config)


def explain(error: ConfigError) -> str:
    """Return the message for a user whose settings cannot be used: a headline, then one line for each setting."""
    count = len(error.problems)
    head = "one setting cannot be used" if count == 1 else f"{count} settings cannot be used"
    lines = [f"finetune.qlora: {head}", *(f"  {problem}" for problem in error.problems)]
    return "\n".join([*lines, f"Every setting is explained by {PROG} --help"])


def _parse_flags(flags: list[str], default: RunConfig) -> RunConfig:
    _refuse_late_file(flags)
    _explain_settings()
    try:
        return tyro.cli(
            RunConfig,
            prog=PROG,
            description=_DESCRIPTION,
            args=flags,
            default=default,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as done:
        if done.code in (0, None):
            print(_epilog())
        raise


@functools.cache
def _explain_settings() -> None:
    """Give tyro the docstring of each setting as one paragraph.

    tyro reads the docstrings itself, but keeps the line breaks of the source, which do not fit a narrower terminal.
    """
    for kind in yaml_file.sections().values():
        texts = {found.arg_name: found.description or "" for found in docstring_parser.parse_from_object(kind).params}
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            kind.__annotations__[name] = Annotated[hint, tyro.conf.arg(help=" ".join(texts[name].split()))]


def _refuse_late_file(flags: list[str]) -> None:
    takes_text = {yaml_file.flag(name) for name, (_, kind) in yaml_file.field_types().items() if kind in _TEXT}
    for before, this in itertools.pairwise(["", *flags]):
        if this.endswith((".yaml", ".yml")) and not this.startswith("-") and before.replace("_", "-") not in takes_text:
            remedy = f"{PROG} {this} --field value ..."
            raise ConfigError(Problem(field="CONFIG", value=this, why="the YAML file comes first", remedy=remedy))


_TEXT = (str, Path, str | None)


def _epilog() -> str:
    ordinary, demo = yaml_file.flatten(RunConfig()), yaml_file.flatten(DEMO)
    changed = [f"{yaml_file.flag(name)} {value}" for name, value in demo.items() if value != ordinary[name]]
    codes = "\n".join(f"  {code.value:>3}  {code.meaning}" for code in ExitCode)
    return f"""\
Without --model and --data the demo runs. It starts from these settings instead of the defaults:
  {"  ".join(changed)}

The output folder:
  adapter/              the result, with tokenizer and model card: PeftModel.from_pretrained(base, "OUTPUT/adapter")
  merged/               the merged model (--merge)
  summary.json          the run's figures; config.yaml holds its settings
  train.jsonl           one row for each step; eval.jsonl has one row for each evaluation
  checkpoints/step-N/   --resume continues from the newest; each has a manifest of checksums

Exit codes:
{codes}

Examples:
  {PROG}                                                 # the demo
  {PROG} --model ./mistral-7b --data chats.jsonl         # your model, your rows
  {PROG} --model ./mistral-7b --data chats.jsonl --seq 2048 --rank 32 --print-config > run.yaml
  {PROG} run.yaml --output runs/second --seed 1          # a file, with two settings overridden
  {PROG} --output runs/second --resume                   # continue after a crash, with the settings recorded there
  {PROG} run.yaml --dry-run --gpu rtx-4080               # would it fit? needs no GPU and no weights

A row of --data has one of these forms: {{"messages": [...]}}, {{"prompt": ..., "completion": ...}}, {{"text": ...}},
  {{"instruction": ..., "input": ..., "output": ...}}, {{"conversations": [{{"from": ..., "value": ...}}]}}. The
  columns "system", "history", "tools" and "chat_template_kwargs" are used too, and in a message "tool_calls" and
  "weight" (0: do not train on this message). The run names each column or key that the prompt leaves out, with the
  number of rows that have it.
CPU threads: set OMP_NUM_THREADS or --threads. While other programs run, 1 is often faster than all cores."""
