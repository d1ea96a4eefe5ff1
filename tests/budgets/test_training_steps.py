"""What a step of every configuration of the command line holds on a dry GPU, tight to 2%; and how it may grow.

The table is ``finetune_budgets.json``; ``python tests/budgets/support/training_cases.py`` measures it anew, which is to
be done, and looked at, when a step is meant to need less or more. A new setting, or a new choice of one, has no budget
until it has a row: a test fails that asks the command line for all of them.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from dry_steps import SHAPES, Case
from training_cases import CARD, SLACK, TABLE, cases, columns, measured

from finetune.config.settings import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from pytest_vram.memory.scaling import fit

MIB = 2**20
ROWS = cases()
BUDGETS: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
SEVEN_B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LENGTHS = (2048, 8192, 14336)
EAGER_LENGTHS = (1024, 2048, 3072)
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
WORDS = (8192, 131072)
CHUNK = 256


def growth() -> dict[str, Case]:
    """The cases of this file that are no rows of the table."""
    more = {
        "50 steps": Case(steps=50),
        "50 steps, 8 bits, 3 micro-batches": Case(steps=50, micro_batches=3, train={"optimizer": "adamw-8bit"}),
        "evaluated and saved": Case(evaluate=True, save=True, micro_batches=2),
        "evaluated and saved, full": Case(
            evaluate=True, save=True, model={"precision": "bf16"}, adapter={"full": True}, train={"optimizer": "adamw"}
        ),
    }
    # With inputs on the host the peak would be in the first layer, where one window's gradients are there already.
    on_card = {"offload_activations": False}
    accumulated = {name: Case(train={"optimizer": name} | on_card) for name in OPTIMIZERS}
    accumulated |= {"7B": Case(seq=2048, shape_changes=SEVEN_B), "mixtral": Case(shape="mixtral")}
    for name, case in accumulated.items():
        for count in (1, 2, 16):
            more[f"{name}, {count} x a micro-batch"] = replace(case, micro_batches=count)
    for optimizer in OPTIMIZERS:
        paged = Case(adapter={"rank": 256}, train={"optimizer": optimizer})  # large enough for states to be paged
        more[f"{optimizer} straight"] = paged
        more[f"{optimizer} resumed"] = replace(paged, resume=True)
    for seq in LENGTHS:
        more[f"flash {seq}"] = Case(seq=seq)
        for words in WORDS:
            more[f"{words} words {seq}"] = Case(
                seq=seq, shape_changes={"vocab_size": words}, train={"loss_chunk": CHUNK}
            )
        more[f"packed {seq}"] = Case(seq=seq, packed=True, steps=1)
    for seq in EAGER_LENGTHS:
        more[f"eager {seq}"] = Case(seq=seq, model={"attention": "eager"})
    return more


GROWTH = growth()


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Figures of every case, from one process."""
    wanted = {**ROWS, **GROWTH}
    return dict(zip(wanted, measured(wanted.values()), strict=True))


def peak(figures: dict[str, Any], name: str) -> int:
    return int(max(figures[name]["step_peaks"]))


def test_the_table_has_every_configuration() -> None:
    assert list(BUDGETS) == list(ROWS), "run tests/budgets/support/training_cases.py"
    for name, case in ROWS.items():
        assert columns(case) | BUDGETS[name] == BUDGETS[name], f"{name}: run tests/budgets/support/training_cases.py"


NO_BYTES = {
    "model": "the shape stands for it",
    "device": "a dry GPU",
    "alpha": "a factor",
    "rslora": "a factor; has a row all the same",
    **dict.fromkeys(("data", "eval_data", "eval_fraction", "skip_bad_rows"), "which rows"),
    "train_on_prompt": "every token of a case is a target",
    **dict.fromkeys(("max_steps", "epochs", "learning_rate", "schedule", "warmup_steps", "weight_decay"), "numbers"),
    "seed": "a number",
    **dict.fromkeys(("batch", "split"), "they decide micro_batch and accumulation"),
    "threads": "of the CPU",
}
"""Settings that cannot change what a step holds on the card, and why."""
NOT_MEASURED = {
    ("shard", True): "needs several ranks; sharded_steps.json has its figures",
    ("offload_base", True): "needs several ranks too, and has a row there",
    ("attention", "flash_attention_2"): "needs a package that is built for the card; sdpa has its kernels",
    ("kernels", "liger"): "what auto is where liger-kernel is installed",
    ("kernels", "torch"): "has the figures of test_sixteen_gb.py",
}


def chosen(case: Case) -> dict[str, Any]:
    """A case's settings under the command line's names."""
    held = {"seq": case.seq, "packing": case.packed}
    return {
        **{f.name: getattr(c, f.name) for c in configs(case) for f in fields(c)},
        **held,
        "micro_batch": case.micro_batch,
        "accumulation": case.micro_batches,
    }


def configs(case: Case) -> tuple[Any, ...]:
    return (ModelConfig(**case.model), AdapterConfig(**case.adapter), DataConfig(), TrainConfig(**case.train))


def offered() -> dict[str, set[Any] | None]:
    """Every setting that may change what a step holds: its choices, or None where it is a number or a list."""
    found: dict[str, set[Any] | None] = {}
    for config in (ModelConfig, AdapterConfig, DataConfig, TrainConfig):
        for name, hint in get_type_hints(config).items():
            choices = {True, False} if hint is bool else set(get_args(hint)) if get_origin(hint) is Literal else None
            found[name] = choices
    return {name: choices for name, choices in found.items() if name not in NO_BYTES}


def test_every_choice_of_the_command_line_has_a_row() -> None:
    settings = [chosen(case) for case in ROWS.values()]
    for name, choices in offered().items():
        taken = {setting[name] for setting in settings}
        if choices is None:
            assert len(taken) >= 2, f"--{name} has rows for {taken} alone"
        else:
            without = {choice for choice in choices - taken if (name, choice) not in NOT_MEASURED}
            assert not without, f"--{name} {sorted(map(str, without))} has no row in training_cases.py"


def test_every_precision_has_a_row_with_every_optimizer_and_without_checkpointing() -> None:
    pairs = {(s["precision"], s["optimizer"]) for s in map(chosen, ROWS.values())}
    kept = {s["precision"] for s in map(chosen, ROWS.values()) if not s["checkpointing"]}
    choices = offered()
    assert pairs == {(p, o) for p in choices["precision"] or () for o in choices["optimizer"] or ()}
    assert kept == choices["precision"]


@pytest.mark.parametrize("name", ROWS)
def test_a_step_keeps_its_budget_and_needs_it(figures: dict[str, Any], name: str) -> None:
    budget = BUDGETS[name]["budget_bytes"]
    needed = peak(figures, name)
    assert needed <= budget, f"{name}: {needed:,} bytes on {CARD}, {needed - budget:,} over its budget"
    assert needed >= budget / SLACK**2, f"{name}: {needed:,} bytes leave more than 2% of the budget: measure it anew"
    assert figures[name]["loaded_bytes"] == BUDGETS[name]["loaded_bytes"]
    assert figures[name]["managed_bytes"] == BUDGETS[name]["managed_bytes"]


@pytest.mark.parametrize("name", [*ROWS, *GROWTH])
def test_nothing_is_left_behind(figures: dict[str, Any], name: str) -> None:
    assert figures[name]["left_bytes"] == 0


@pytest.mark.parametrize("name", ["50 steps", "50 steps, 8 bits, 3 micro-batches"])
def test_fifty_steps_leak_not_one_byte(figures: dict[str, Any], name: str) -> None:
    assert len(set(figures[name]["after_steps"])) == 1
    assert len(set(figures[name]["step_peaks"][1:])) == 1


@pytest.mark.parametrize("name", ["evaluated and saved", "evaluated and saved, full"])
def test_evaluating_and_saving_never_set_the_peak(figures: dict[str, Any], name: str) -> None:
    assert figures[name]["other_peaks"]
    assert max(figures[name]["other_peaks"]) < peak(figures, name)


def requested(figures: dict[str, Any], name: str) -> int:
    """Peak to the byte, without what the allocator's blocks are larger than what was asked for."""
    return int(max(figures[name]["step_requests"]))


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "adamw"])
def test_more_micro_batches_add_one_windows_gradients_to_the_byte(figures: dict[str, Any], optimizer: str) -> None:
    sides = 512 + 512 + 2 * (512 + 128) + 512 + 512 + 3 * (512 + 1408)  # in + out of a layer's seven matrices
    gradients = 4 * 16 * sides * 2  # 4 layers, rank 16, bf16
    many, two, one = (requested(figures, f"{optimizer}, {count} x a micro-batch") for count in (16, 2, 1))
    assert many == two
    assert many - one == gradients


@pytest.mark.parametrize("model", ["paged-adamw", "paged-adamw-8bit", "7B", "mixtral"])
def test_a_paged_optimizer_has_earlier_gradients_wait_on_the_host(figures: dict[str, Any], model: str) -> None:
    """Sixteen micro-batches need no more than one: the article's promise for accumulation, kept to the byte."""
    many, one = requested(figures, f"{model}, 16 x a micro-batch"), requested(figures, f"{model}, 1 x a micro-batch")
    assert many == one
    assert peak(figures, f"{model}, 16 x a micro-batch") <= 1.01 * peak(figures, f"{model}, 1 x a micro-batch")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_needs_no_more_than_the_run_it_resumes(figures: dict[str, Any], optimizer: str) -> None:
    straight, resumed = figures[f"{optimizer} straight"], figures[f"{optimizer} resumed"]
    assert resumed["after_steps"][-1] == straight["after_steps"][-1]
    assert resumed["managed_bytes"] == straight["managed_bytes"]
    assert (resumed["managed_bytes"] > 0) == ("paged" in optimizer)
    assert max(resumed["step_peaks"]) <= max(straight["step_peaks"])
    assert max(resumed["other_peaks"]) < max(straight["step_peaks"])


def steepening(figures: dict[str, Any], name: str, lengths: tuple[int, ...]) -> float:
    """How much more the second half of the length costs than the first: 1 where growth is linear."""
    steps = [later - earlier for earlier, later in pairwise(peak(figures, f"{name} {seq}") for seq in lengths)]
    return steps[-1] / steps[0]


def test_growth_with_the_sequence_is_linear(figures: dict[str, Any]) -> None:
    assert steepening(figures, "flash", LENGTHS) == pytest.approx(1.0, abs=0.05)


def test_packed_rows_grow_linearly_and_cost_nothing_beside_one_row(figures: dict[str, Any]) -> None:
    """A mask of every pair of tokens would grow with the square: 196 MiB of truth values at the longest."""
    peaks = [peak(figures, f"packed {seq}") for seq in LENGTHS]
    assert fit("seq", LENGTHS, peaks).order == pytest.approx(1.0, abs=0.05)
    assert max(peaks) <= 1.01 * peak(figures, f"flash {max(LENGTHS)}")


def test_growth_without_flash_attention_is_not(figures: dict[str, Any]) -> None:
    """The control: attention that writes its weights down."""
    assert steepening(figures, "eager", EAGER_LENGTHS) > 1.5


def test_logits_stay_below_one_chunk(figures: dict[str, Any]) -> None:
    """Sixteen times the vocabulary costs one chunk's logits in bf16 and fp32, at every length the same."""
    few, many = WORDS
    words = many - few
    for seq in LENGTHS:
        small, large = figures[f"{few} words {seq}"], figures[f"{many} words {seq}"]
        dearer = max(large["step_peaks"]) - large["loaded_bytes"] - max(small["step_peaks"]) + small["loaded_bytes"]
        assert dearer <= CHUNK * words * (2 + 4), f"{seq} tokens: {dearer / MIB:.0f} MiB"
    assert dearer < 14336 * words * 2 / 10  # a tenth of what all logits would take in bf16


def test_paged_states_are_off_the_card_and_as_large_as_on_it(figures: dict[str, Any]) -> None:
    plain, paged = (figures[f"rank 256 {name}"] for name in ("adamw-8bit", "paged-adamw-8bit"))
    assert plain["managed_bytes"] == 0
    assert paged["managed_bytes"] == plain["after_steps"][-1] - paged["after_steps"][-1] > 0
    # 4 bytes more for each of two moments, 8 bits against 32: everything but their scales.
    wide = figures["rank 256 paged-adamw"]["managed_bytes"]
    assert wide == paged["managed_bytes"] // (1 + 1 + 2) * (4 + 4 + 2)


def test_shapes_are_small_enough_to_be_quick() -> None:
    assert all(shape["hidden_size"] <= 512 for shape in SHAPES.values())
