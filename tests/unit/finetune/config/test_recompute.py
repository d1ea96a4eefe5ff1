"""``--checkpointing``: its words, a number, the switch that it was, and the same in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune import cli
from finetune.config import yaml_file
from finetune.config.recompute import inputs_on_host, layers_recomputed
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["--model", "m", "--data", "rows.jsonl"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--checkpointing", "auto"], "auto"),
        (["--checkpointing", "all"], "all"),
        (["--checkpointing", "none"], "none"),
        (["--checkpointing", "8"], 8),
        (["--checkpointing=8"], 8),
        (["--checkpointing", "0"], 0),
        (["--checkpointing", "true"], "all"),
        (["--checkpointing=False"], "none"),
        (["--checkpointing"], "all"),
        (["--checkpointing", "--rank", "4"], "all"),
        (["--no-checkpointing"], "none"),
        (["--checkpointing", "8", "--no-checkpointing"], "none"),
        (["--no-checkpointing", "--checkpointing", "8"], 8),
    ],
)
def test_flags(flags: list[str], expected: Any) -> None:
    found = cli.parse([*flags, *DATA]).train.checkpointing
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("all", "all"), ("none", "none"), ("8", 8), ("1", 1), ("true", "all"), ("false", "none")],
)
def test_a_file_and_what_is_written_back(text: str, expected: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"checkpointing: {text}\n")
    config = cli.parse([str(file), *DATA])
    assert (config.train.checkpointing, type(config.train.checkpointing)) == (expected, type(expected))
    file.write_text(yaml_file.dump(config))
    assert cli.parse([str(file)]).train == config.train


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--checkpointing", "most"],
            "checkpointing = 'most': not a choice of layers; use auto, all, none, or the num",
        ),
        (["--checkpointing=1.5"], "checkpointing = '1.5': not a choice of layers"),
        (["--checkpointing", "-3"], "checkpointing = -3: too small; use 0 or more"),
        (["--checkpointing", "0", "--offload-activations"], "use --checkpointing all, or --no-offload-activations"),
        (["--no-checkpointing", "--offload-activations"], "use --checkpointing all, or --no-offload-activations"),
        (["--offload-activations", "some"], "offload_activations = 'some': not a choice of where the layers' inputs"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_remedy(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        cli.parse([*flags, *DATA])
    assert said in str(raised.value)


@pytest.mark.parametrize("text", ["most", "1.5", "[1, 2]"])
def test_a_file_with_another_value_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"checkpointing: {text}\n")
    with pytest.raises(ConfigError, match="not one of auto, all, none or a whole number"):
        cli.parse([str(file), *DATA])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("auto", 32), ("all", 32), ("none", 0), (8, 8), (0, 0), (40, 32), (True, 32), (False, 0)],
)
def test_layers_that_recompute(setting: Any, expected: int) -> None:
    assert layers_recomputed(setting, 32) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--offload-activations"], True),
        (["--offload-activations", "--rank", "4"], True),
        (["--offload-activations", "true"], True),
        (["--offload-activations", "True"], True),
        (["--offload-activations=false"], False),
        (["--no-offload-activations"], False),
        (["--offload-activations", "auto"], "auto"),
        (["--offload-activations", "--no-offload-activations"], False),
        (["--no-offload-activations", "--offload-activations", "--checkpointing", "8"], True),
    ],
)
def test_where_inputs_wait(flags: list[str], expected: Any, tmp_path: Path) -> None:
    config = cli.parse([*flags, *DATA])
    found = config.train.offload_activations
    assert (found, type(found)) == (expected, type(expected))
    file = tmp_path / "run.yaml"
    file.write_text(yaml_file.dump(config))
    assert cli.parse([str(file)]).train == config.train


def test_a_file_with_another_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("offload_activations: some\n")
    with pytest.raises(ConfigError, match="not one of auto or true or false"):
        cli.parse([str(file), *DATA])


@pytest.mark.parametrize(
    ("setting", "device", "sharded", "expected"),
    [
        ("auto", "cuda", False, True),
        ("auto", "auto", False, True),
        ("auto", "cpu", False, False),
        ("auto", "cuda", True, False),
        (True, "cpu", True, True),
        (False, "cuda", False, False),
    ],
)
def test_what_auto_means(setting: Any, device: str, sharded: bool, expected: bool) -> None:
    assert inputs_on_host(setting, device, sharded=sharded) is expected
