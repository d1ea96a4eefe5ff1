"""``--shard`` is refused where it does not work, each time with what to do instead."""

from __future__ import annotations

import pytest

from finetune import cli, launch
from finetune.config import yaml_file
from finetune.config.cards import dry_ranks
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
        (["--full", "--precision", "bf16", "--optimizer", "adamw-8bit"], "use --optimizer paged-adamw or adamw"),
        (["--precision", "int8"], "use --precision nf4 or fp4"),
        (["--precision", "bf16"], "use --precision nf4 or fp4"),
        (["--dora"], "use --no-dora"),
        (["--merge", "quantized-base"], "use --merge none"),
        (["--dry-run", "--gpu", "rtx-3090", "--count", "1"], "use --no-shard"),
        (["--fit", "--gpu", "rtx-3090", "--count", "1"], "use --no-shard"),
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


@pytest.mark.parametrize("answer", ["--dry-run", "--fit"])
def test_a_dry_run_of_one_process_says_how_many_cards_it_needs_to_know(answer: str) -> None:
    with pytest.raises(ConfigError, match="such as --count 2"):
        cli.parse(["--shard", answer, "--gpu", "rtx-3090"])
    assert cli.parse(["--shard", answer, "--gpu", "rtx-3090", "--count", "2"]).dry.count == 2


@pytest.mark.usefixtures("two_ranks")
def test_under_a_launcher_a_dry_run_has_as_many_cards_as_ranks() -> None:
    assert dry_ranks(cli.parse(["--shard", "--dry-run", "--gpu", "rtx-3090"])) == 2
    assert dry_ranks(cli.parse(["--dry-run", "--gpu", "rtx-3090", "--count", "4"])) == 4  # the demo has as many parts


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--count", "2"], "count", "start the run with torchrun"),
        (["--dry-run", "--gpu", "l4", "--count", "0"], "count", "use --count 2"),
        (["--dry-run", "--gpu", "l4", "--count", "65"], "count", "use --count 2"),
        (["--fit", "--gpu", "l4", "--count", "8", "--accumulation", "4"], "accumulation", "use --accumulation 8"),
    ],
)
def test_a_number_of_cards_that_cannot_be_is_refused(flags: list[str], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(flags)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert remedy in problem.remedy


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("flags", [[], ["--shard", "--full", "--precision", "bf16"]])
def test_a_base_without_parts_cannot_wait_on_the_host(flags: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse([*flags, "--offload-base"])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("offload_base", True)
    assert "add --shard and leave --full out, or use --no-offload-base" in problem.remedy
    assert cli.parse(["--shard", "--offload-base"]).model.offload_base


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw"])
def test_all_weights_are_sharded(optimizer: str) -> None:
    validate(cli.parse(["--full", "--precision", "bf16", "--optimizer", optimizer, "--shard"]))


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_four_bits_are_sharded(precision: str) -> None:
    validate(cli.parse(["--precision", precision, "--shard"]))


@pytest.mark.usefixtures("two_ranks")
def test_a_resumed_run_may_change_it_up_to_rounding() -> None:
    before, now = (yaml_file.json_values(cli.parse([*flags])) for flags in (["--shard"], []))
    (note,) = check_settings(before, now)
    assert "shard changed" in note
