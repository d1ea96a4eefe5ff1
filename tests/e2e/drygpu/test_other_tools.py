"""The examples of other tools: `run` takes each command, and each tool that is installed takes its configuration."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pytest_vram.commands import run, run_standins
from pytest_vram.drygpu.cards import find_card

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "other_tools"
COMMANDS = re.findall(
    r"^\$ cd (?:\.\./)?(\w+)\n\$ python -m pytest_vram (.*)$", (FOLDER / "README.md").read_text(), re.M
)

READERS = {
    "trl": "from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser\n"
    "parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))\n"
    "found = parser.parse_args_and_config(['--config', 'sft.yaml', '--use_cpu'])\n"
    "print(found[1].max_length)\n",
    "axolotl": "import yaml\nfrom axolotl.utils.schemas.config import AxolotlInputConfig\n"
    "print(AxolotlInputConfig(**yaml.safe_load(open('lora.yml'))).sequence_len)\n",
    "llamafactory": "import yaml\nfrom transformers import HfArgumentParser\n"
    "from llamafactory.hparams import DataArguments, FinetuningArguments, GeneratingArguments, ModelArguments\n"
    "from llamafactory.hparams import TrainingArguments\n"
    "kinds = (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments)\n"
    "read = yaml.safe_load(open('lora.yaml')) | {'bf16': False}\n"
    "print(HfArgumentParser(kinds).parse_dict(read)[1].cutoff_len)\n",
    "torchtune": "from omegaconf import OmegaConf\nfrom torchtune import config\n"
    "found = OmegaConf.load('lora.yaml')\nconfig.validate(found)\nprint(found.tokenizer.max_seq_len)\n",
    "litgpt": "from jsonargparse import ArgumentParser\nfrom litgpt.finetune.lora import setup\n"
    "parser = ArgumentParser()\nparser.add_argument('--config', action='config')\n"
    "parser.add_function_arguments(setup)\n"
    "print(parser.parse_args(['--config', 'lora.yaml']).train.max_seq_length)\n",
}
"""A program for each tool that reads its configuration as the tool does, and prints the length of a row."""


def parsed(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    return parser.parse_args(shlex.split(text))


def entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All names of a configuration with their values, also those inside of others."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list):
            yield from entries(value)
        else:
            yield str(name), value


def test_every_folder_has_its_command() -> None:
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    assert {tool for tool, _ in COMMANDS} == folders == set(READERS)


@pytest.mark.parametrize(("tool", "text"), COMMANDS)
def test_run_takes_the_command_and_finds_the_length(tool: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER / tool)
    args = parsed(text)
    assert find_card(args.gpu)
    (model,) = (found := run_standins.from_arguments(args)).models
    (config,) = (path for path in Path().iterdir() if path.suffix in (".yml", ".yaml"))
    content = dict(entries(yaml.safe_load(config.read_text())))
    assert model.name in content.values(), "the model of the command is the one of the configuration"
    assert [name for name in found.data if name not in content.values()] == []
    (length,) = {content[name] for name in run_standins._LENGTHS if name in content}
    if found.rows:
        assert run_standins._longest_length(args.command) == length
    else:
        rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
        assert {len(row["output"].split()) for row in rows} == {length}, "rows as long as the configuration allows"
    for script in (Path(word) for word in args.command if word.endswith(".sh")):
        assert config.name in script.read_text()
        assert model.name in script.read_text()


@pytest.mark.parametrize("tool", READERS)
def test_the_tool_takes_its_configuration(tool: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", READERS[tool]], cwd=FOLDER / tool, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) in (1024, 2048)
