"""The command line: a setting has the same name everywhere, and an error names its remedy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from finetune import cli
from finetune.config import yaml_file
from finetune.config.settings import DEMO, RunConfig
from finetune.disk.run_folder import RunFolder
from finetune.errors import ConfigError, ExitCode


def problems(argv: list[str]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        cli.parse(argv)
    return {problem.field: str(problem) for problem in caught.value.problems}


def test_nothing_given_is_the_demo() -> None:
    assert cli.parse([]) == DEMO


def test_own_data_starts_from_the_ordinary_defaults() -> None:
    config = cli.parse(["--data", "rows.jsonl"])
    assert config == yaml_file.replace(RunConfig(), {"data": "rows.jsonl"})


def test_a_flag_wins_over_the_demo() -> None:
    assert cli.parse(["--rank", "3"]) == yaml_file.replace(DEMO, {"rank": 3})


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: rows.jsonl\nrank: 4\nlearning_rate: 2e-5\n")
    config = cli.parse([str(file), "--rank", "5"])
    assert (config.adapter.rank, config.train.learning_rate) == (5, 2e-5)
    assert config.train.accumulation == RunConfig().train.accumulation


ODD_VALUES: dict[str, Any] = {
    "question": "no: 1e3 #\n- é ~",
    "targets": ("true", "1e5", "null"),
    "output": Path("a b/c"),
    "epochs": 1e-9,
    "max_steps": 7,
    "model": "010",
    "data": "yes",
    "eval_data": "2020-01-01",
    "double_quant": False,
    "merge": "full-base",
}


def test_printed_config_reproduces_the_run(tmp_path: Path) -> None:
    config = yaml_file.replace(RunConfig(), ODD_VALUES)
    file = tmp_path / "run.yaml"
    file.write_text(yaml_file.dump(config))
    assert cli.parse([str(file)]) == config


def test_printed_demo_reproduces_the_demo(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml_file.dump(cli.parse([])))
    assert cli.parse([str(file)]) == DEMO


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--leraning-rate", "--learning-rate"), ("--max-step", "--max-steps"), ("--precison=nf4", "--precision")],
)
def test_misspelt_flag_names_the_near_one(flag: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse([flag, "3"])
    assert stopped.value.code == ExitCode.USAGE
    assert near in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "field", "says"),
    [
        ("lerning_rate: 1", "lerning_rate", "did you mean learning_rate?"),
        ("rank: 8.5", "rank", "not a whole number"),
        ("rank: true", "rank", "not a whole number"),
        ("rank: 010", "rank", "not a whole number"),
        ("rank: [1]", "rank", "not a whole number"),
        ("resume: yes", "resume", "not true or false"),
        ("precision: nf5", "precision", "did you mean nf4?"),
        ("learning_rate: fast", "learning_rate", "not a number"),
        ("targets: 3", "targets", "not a list of names"),
        ("question: 3", "question", "not text (put it in quotes)"),
        ("output: 3", "output", "not a path"),
        ("adapter: {rank: 3}", "adapter", "write them at the top level, such as `rank: 3`"),
        ("rank: 1\nrank: 2", "CONFIG", "rank is given twice"),
        ("- rank", "CONFIG", "holds a list"),
        ("rank: [", "CONFIG", "not YAML"),
    ],
)
def test_wrong_yaml_is_explained(line: str, field: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(line + "\n")
    assert says in problems([str(file)])[field]


def test_every_wrong_key_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rnak: 1\nseq: long\nmergee: none\n")
    assert set(problems([str(file)])) == {"rnak", "seq", "mergee"}


def test_missing_config_file_is_named() -> None:
    assert "No such file" in problems(["nowhere.yaml"])["CONFIG"]


def test_config_file_after_flags_is_refused() -> None:
    assert "comes first" in problems(["--rank", "3", "run.yaml"])["CONFIG"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--rank", "0"],
        ["--alpha", "nan"],
        ["--dropout", "1"],
        ["--dropout", "-0.1"],
        ["--eval-fraction", "1"],
        ["--seq", "1"],
        ["--max-steps", "0"],
        ["--epochs", "0"],
        ["--epochs", "inf"],
        ["--micro-batch", "0"],
        ["--accumulation", "-1"],
        ["--learning-rate", "0"],
        ["--warmup-steps", "-1"],
        ["--weight-decay", "-1"],
        ["--clip", "nan"],
        ["--loss-chunk", "0"],
        ["--seed", "-1"],
        ["--threads", "-1"],
        ["--save-every", "-1"],
        ["--keep", "0"],
        ["--eval-every", "-1"],
        ["--answer-tokens", "-1"],
        ["--question", " "],
        ["--model", ""],
        ["--data", ""],
        ["--targets"],
        ["--full", "--precision", "nf4"],
        ["--gpu", "rtx-4080"],
    ],
    ids=" ".join,
)
def test_value_out_of_range_is_refused_by_name(argv: list[str]) -> None:
    field = argv[0].removeprefix("--").replace("-", "_")
    assert list(problems(argv)) == [field]


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--full", "--precision", "bf16", "--merge", "full-base"], "merge"),
        (["--full", "--precision", "bf16", "--dora"], "dora"),
        (["--full", "--precision", "bf16", "--targets", "q_proj"], "targets"),
        (["--full", "--precision", "bf16", "--exclude", "mlp"], "exclude"),
        (["--rank", "3", "--init", "orthogonal"], "rank"),
        (["--precision", "bf16", "--merge", "quantized-base"], "merge"),
        (["--offload-activations", "--no-checkpointing"], "offload_activations"),
        (["--device", "cpu", "--attention", "flash_attention_2"], "attention"),
    ],
)
def test_combination_that_cannot_work_is_refused(argv: list[str], field: str) -> None:
    assert list(problems(argv)) == [field]


def test_several_problems_are_told_together() -> None:
    assert set(problems(["--rank", "0", "--seq", "0", "--dropout", "2"])) == {"rank", "seq", "dropout"}


def test_resume_takes_the_recorded_settings_and_flags_win(tmp_path: Path) -> None:
    recorded = yaml_file.replace(RunConfig(), {"data": "rows.jsonl", "rank": 4, "seed": 9})
    RunFolder(tmp_path).config.write_text(yaml_file.dump(recorded))
    config = cli.parse(["--resume", "--output", str(tmp_path), "--seed", "8"])
    assert config == yaml_file.replace(recorded, {"output": tmp_path, "resume": True, "seed": 8})


def test_every_setting_has_one_name() -> None:
    names = [f.name for cls in yaml_file.sections().values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_help_names_every_flag_exit_code_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == ExitCode.OK
    for name in yaml_file.field_types():
        assert "--" + name.replace("_", "-") in text
    for code in ExitCode:
        assert f"{code.value:>3}  {code.meaning}" in text
    assert "--model ./mistral-7b --data chats.jsonl" in text


def test_a_settings_help_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    """The line breaks of the source do not reach a terminal, which breaks lines itself."""
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for section in yaml_file.sections().values():
        for name, hint in typing.get_type_hints(section, include_extras=True).items():
            text = hint.__metadata__[-1].help
            assert text, name
            assert "\n" not in text, name
            assert " ".join(text.split()) in words, name


def test_help_and_mistakes_load_nothing_heavy() -> None:
    code = (
        "import sys; from finetune import cli\n"
        "try: cli.parse(['--rank', '0'])\n"
        "except cli.ConfigError: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
