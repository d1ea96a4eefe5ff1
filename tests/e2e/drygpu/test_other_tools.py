"""The examples of other tools: `run` takes each command, and each tool that is installed takes its configuration."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pytest_vram.commands import run, run_standins
from pytest_vram.drygpu.cards import find_card

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
}
"""A program for each tool that reads its configuration as the tool does, and prints the length of a row."""


def parsed(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    return parser.parse_args(shlex.split(text))


def test_every_folder_has_its_command() -> None:
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    assert {tool for tool, _ in COMMANDS} == folders == set(READERS)


@pytest.mark.parametrize(("tool", "text"), COMMANDS)
def test_run_takes_the_command_and_finds_the_length(tool: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER / tool)
    args = parsed(text)
    assert find_card(args.gpu)
    (model,) = (found := run_standins.from_arguments(args)).models
    config = next(Path(word) for word in args.command if word.endswith((".yml", ".yaml")))
    content = yaml.safe_load(config.read_text())
    assert model.name in content.values(), "the model of the command is the one of the configuration"
    assert [name for name in found.data if name not in config.read_text()] == []
    assert run_standins._longest_length(args.command) in {content.get(name) for name in run_standins._LENGTHS}


@pytest.mark.parametrize("tool", READERS)
def test_the_tool_takes_its_configuration(tool: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", READERS[tool]], cwd=FOLDER / tool, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) in (1024, 2048)
