"""``--shard`` is refused where it does not work, each time with what to do instead."""

from __future__ import annotations

import pytest

from finetune import cli, launch
from finetune.config import yaml_file
from finetune.config.validate import validate
from finetune.disk.resume import check_settings
from finetune.errors import ConfigError


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "size", lambda: 2)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--full", "--precision", "bf16"], "use --no-full"),
        (["--precision", "int8"], "use --precision nf4 or fp4"),
        (["--precision", "bf16"], "use --precision nf4 or fp4"),
        (["--dora"], "use --no-dora"),
        (["--merge", "quantized-base"], "use --merge none"),
        (["--dry-run", "--gpu", "rtx-3090"], "use --no-shard"),
        (["--fit", "--gpu", "rtx-3090"], "use --no-shard"),
    ],
)
def test_what_does_not_work_is_refused_with_the_remedy(flags: list[str], remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse([*flags, "--shard"])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("shard", True)
    assert remedy in problem.remedy


def test_one_process_has_nothing_to_shard_over_and_may_print_the_settings() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node N"):
        cli.parse(["--shard"])
    assert cli.parse(["--shard", "--print-config"]).model.shard


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_four_bits_are_sharded(precision: str) -> None:
    validate(cli.parse(["--precision", precision, "--shard"]))


@pytest.mark.usefixtures("two_ranks")
def test_a_resumed_run_may_change_it_up_to_rounding() -> None:
    before, now = (yaml_file.plain(cli.parse([*flags])) for flags in (["--shard"], []))
    (note,) = check_settings(before, now)
    assert "shard changed" in note
