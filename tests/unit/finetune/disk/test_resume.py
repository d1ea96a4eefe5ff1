"""Which differences between a run and its resumption are allowed, and which are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.disk.resume import FREE, RunFacts, check_settings, compare, fingerprint
from finetune.errors import ConfigError

SETTINGS = yaml_file.json_values(RunConfig())


def facts(**changes: Any) -> RunFacts:
    base = RunFacts(settings=SETTINGS, threads=1, device="cpu", base="b", data="d", versions={"torch": "2.14"})
    return dataclasses.replace(base, **changes)


def with_settings(**changes: Any) -> dict[str, Any]:
    return yaml_file.json_values(yaml_file.replace(RunConfig(), changes))


OTHER_VALUES: dict[str, Any] = {
    "precision": "fp4",
    "double_quant": False,
    "compute_dtype": "bf16",
    "resize_embeddings": True,
    "attention": "eager",
    "device": "cuda",
    "full": True,
    "rank": 7,
    "alpha": 7.0,
    "targets": ("q_proj",),
    "exclude": ("o_proj",),
    "dropout": 0.5,
    "rslora": True,
    "dora": True,
    "init": "gaussian",
    "adapter_dtype": "bf16",
    "eval_fraction": 0.2,
    "seq": 7,
    "packing": True,
    "skip_bad_rows": True,
    "train_on_prompt": True,
    "max_steps": 7,
    "epochs": 7.0,
    "micro_batch": 7,
    "accumulation": 7,
    "learning_rate": 7.0,
    "schedule": "linear",
    "warmup_steps": 7,
    "weight_decay": 7.0,
    "clip": 7.0,
    "optimizer": "adamw",
    "seed": 7,
}


def test_every_setting_is_either_free_or_tried_here() -> None:
    assert set(SETTINGS) == set(FREE) | set(OTHER_VALUES) | {"loss_chunk", "shard"}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_that_changes_the_numbers_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(SETTINGS, with_settings(**{name: OTHER_VALUES[name]}))
    assert [p.field for p in caught.value.problems] == [name]
    assert f"had {SETTINGS[name]!r}" in str(caught.value)


def test_what_is_written_and_where_may_change() -> None:
    assert (
        check_settings(SETTINGS, with_settings(keep=9, output="x", checkpointing=False, model="moved", resume=True))
        == []
    )


def test_a_constant_schedule_may_be_made_longer() -> None:
    before = with_settings(schedule="constant", max_steps=10)
    assert check_settings(before, with_settings(schedule="constant", max_steps=20)) == []


def test_the_same_window_may_be_split_another_way_and_is_noted() -> None:
    notes = check_settings(with_settings(micro_batch=1, accumulation=8), with_settings(micro_batch=4, accumulation=2))
    assert len(notes) == 1
    assert "up to rounding" in notes[0]


def test_another_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="accumulation"):
        check_settings(with_settings(micro_batch=1, accumulation=8), with_settings(micro_batch=4, accumulation=4))


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"packing": True}])
def test_with_dropout_or_packing_the_split_is_part_of_the_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="micro_batch"):
        check_settings(
            with_settings(micro_batch=1, accumulation=8, **changes),
            with_settings(micro_batch=8, accumulation=1, **changes),
        )


@pytest.mark.parametrize(
    ("change", "field"),
    [({"threads": 2}, "threads"), ({"device": "cuda"}, "device"), ({"base": "x"}, "model"), ({"data": "x"}, "data")],
)
def test_another_thread_count_device_base_or_data_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compare(facts(), facts(**change))
    assert [p.field for p in caught.value.problems] == [field]


def test_a_model_whose_gradient_depends_on_the_split_keeps_it() -> None:
    before = facts(settings=with_settings(micro_batch=1, accumulation=8))
    now = facts(settings=with_settings(micro_batch=4, accumulation=2))
    assert len(compare(before, now)) == 1
    with pytest.raises(ConfigError, match=r"micro_batch = 4: .*had 1: it has dropout.*set it back to 1") as caught:
        compare(before, now, split_matters="it has dropout")
    assert [p.field for p in caught.value.problems] == ["micro_batch", "accumulation"]
    assert compare(before, before, split_matters="it has dropout") == []


def test_other_versions_are_noted() -> None:
    assert compare(facts(), facts(versions={"torch": "2.15"})) == [
        "torch was 2.14 and is now 2.15: the last bits may differ"
    ]


def test_packages_that_come_and_go_are_noted() -> None:
    with_liger = facts(versions={"torch": "2.14", "liger-kernel": "0.8"})
    assert compare(facts(), with_liger) == ["liger-kernel was not installed and is now 0.8: the last bits may differ"]
    assert compare(with_liger, facts()) == ["liger-kernel was 0.8 and is now not installed: the last bits may differ"]


@pytest.mark.parametrize(
    ("device", "kernels", "noted"), [("cuda", "auto", True), ("cuda", "torch", False), ("cpu", "auto", False)]
)
def test_a_run_that_began_before_there_were_fused_kernels(device: str, kernels: str, noted: bool) -> None:
    before = facts(settings={name: value for name, value in SETTINGS.items() if name != "kernels"}, device=device)
    notes = compare(before, facts(settings=with_settings(kernels=kernels), device=device))
    assert ["without fused kernels" in note for note in notes] == [True] * noted


def test_the_fingerprint_sees_values_names_and_shapes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model) != first
    assert fingerprint(torch.nn.Sequential(model)) != fingerprint(model)
