"""The command line from end to end on a tiny model: what a run leaves behind, and how it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Forked, Outcome


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_closing_text_has_what_one_wants_to_know(finished: tuple[Path, Outcome]) -> None:
    output, outcome = finished
    for words in ("held-out loss", "before", "after", "question", "tokens/s", "GiB resident", str(output / "adapter")):
        assert words in outcome.out


def test_the_summary_holds_the_figures(finished: tuple[Path, Outcome]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["steps"] == 10
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert summary["peak_rss_bytes"] > 2**27
    assert summary["tokens_per_second"] > 0
    assert summary["question"].startswith("add ")
    assert summary["settings"]["accumulation"] == 4


def test_every_step_and_evaluation_has_its_row(finished: tuple[Path, Outcome]) -> None:
    rows = [json.loads(line) for line in (finished[0] / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert set(rows[0]) >= {"loss", "targets", "tokens", "grad_norm", "learning_rate", "seconds", "tokens_per_second"}
    rows = [json.loads(line) for line in (finished[0] / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10]


def test_the_last_checkpoints_are_kept(finished: tuple[Path, Outcome]) -> None:
    assert sorted(os.listdir(finished[0] / "checkpoints")) == ["step-00000008", "step-00000010"]


def test_nothing_half_written_is_left(finished: tuple[Path, Outcome]) -> None:
    assert [p.name for p in finished[0].rglob(".*")] == [".lock"]


def test_the_log_is_free_of_other_libraries_noise(finished: tuple[Path, Outcome]) -> None:
    assert "Warning" not in finished[1].err
    assert "kernels" not in finished[1].err
    assert "Loading weights" not in finished[1].err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_the_adapter_loads_and_gives_the_held_out_loss(finished: tuple[Path, Outcome], tiny_llama: Path) -> None:
    import torch
    from peft import PeftModel

    from finetune import cli
    from finetune.data.batches import batches, load_examples
    from finetune.model.load import load_base, load_tokenizer
    from finetune.training.step import evaluate

    output = finished[0]
    config = cli.parse([str(output / "config.yaml")])
    model = PeftModel.from_pretrained(load_base(config.model), str(output / "adapter"))
    data = load_examples(config.data, load_tokenizer(config.model), seed=config.train.seed)
    with torch.no_grad():
        stats = evaluate(model, batches(data.held_out, micro_batch=1), config.train)
    summary = json.loads((output / "summary.json").read_text())
    assert stats.loss == pytest.approx(summary["held_out_loss_after"], abs=1e-6)


def test_the_result_has_tokenizer_and_card(finished: tuple[Path, Outcome], tiny_llama: Path) -> None:
    folder = finished[0] / "adapter"
    names = set(os.listdir(folder))
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "| held-out loss after |" in card
    assert "\naccumulation: 4\n" in card
    assert str(tiny_llama) in card


def test_a_printed_config_reproduces_the_adapter(qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    printed = qlora(tmp_path / "unused", "--print-config")
    assert printed.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(printed.out)
    output = tmp_path / "again"
    assert qlora.raw([str(file), "--output", str(output)], output=output).code == 0
    assert adapter(output) == adapter(finished[0])
    assert not (tmp_path / "unused").exists()


def test_a_run_is_not_overwritten_unless_asked(qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    before = adapter(finished[0])
    refused = qlora(finished[0])
    assert refused.code == 2
    assert "holds a run already" in refused.err
    assert "--resume" in refused.err
    assert adapter(finished[0]) == before
    output = tmp_path / "run"
    for flags in ((), ("--overwrite", "--seed", "1")):
        assert qlora(output, *flags, "--max-steps", "1").code == 0
    assert json.loads((output / "summary.json").read_text())["settings"]["seed"] == 1


def test_resuming_a_finished_run_changes_nothing(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert qlora(output, "--max-steps", "2").code == 0
    before = {name: (output / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")} | {"a": adapter(output)}
    again = qlora.raw(["--output", str(output), "--resume"], output=output)  # the settings are those recorded
    assert again.code == 0, again.err
    assert "after step 2" in again.err
    assert before == {name: (output / name).read_bytes() for name in ("train.jsonl", "eval.jsonl")} | {
        "a": adapter(output)
    }


def test_resume_with_nothing_there_starts_and_says_so(qlora: Forked, tmp_path: Path) -> None:
    outcome = qlora(tmp_path / "run", "--resume", "--max-steps", "1")
    assert outcome.code == 0
    assert "starting at step 0" in outcome.err


def test_resuming_with_other_settings_is_refused_by_name(qlora: Forked, finished: tuple[Path, Outcome]) -> None:
    config = (finished[0] / "config.yaml").read_text()
    refused = qlora(finished[0], "--resume", "--rank", "8", "--dropout", "0.5")
    assert refused.code == 2
    assert "rank = 8: the run that is resumed had 16" in refused.err
    assert "dropout = 0.5" in refused.err
    assert (finished[0] / "config.yaml").read_text() == config


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_done_and_the_run_goes_on(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path, number: int
) -> None:
    output = tmp_path / "run"
    at = finished[1].moments // 2
    stopped = qlora(output, "--save-every", "0", fault={"kind": "signal", "at": at, "signals": [number]})
    assert stopped.code == 130, stopped.err
    assert f"--output {output} --resume" in stopped.err
    assert len(list((output / "checkpoints").iterdir())) == 1
    assert qlora(output, "--resume").code == 0
    assert adapter(output) == adapter(finished[0])


def test_a_second_signal_stops_at_once(qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    at = finished[1].moments // 2
    fault = {"kind": "signal", "at": at, "signals": [signal.SIGINT, signal.SIGINT]}
    stopped = qlora(tmp_path / "run", "--save-every", "0", fault=fault)
    assert stopped.code == 130
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []


def test_a_signal_before_the_first_step_exits_130(qlora: Forked, tmp_path: Path) -> None:
    stopped = qlora(tmp_path / "run", fault={"kind": "signal", "at": 3, "signals": [signal.SIGINT]})
    assert stopped.code == 130
    assert "--resume" in stopped.err


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.97])
def test_a_full_disk_loses_nothing_saved(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path, share: float
) -> None:
    output = tmp_path / "run"
    full = qlora(output, fault={"kind": "full", "at": int(finished[1].moments * share)})
    assert full.code == 4, full.err
    assert "No space left on device" in full.err
    assert "MiB are free" in full.err
    resumed = qlora(output, "--resume")
    assert resumed.code == 0, resumed.err
    assert adapter(output) == adapter(finished[0])


@pytest.mark.parametrize("of", ["torch", "python"])
def test_out_of_host_memory_is_explained(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path, of: str
) -> None:
    output = tmp_path / "run"
    at = finished[1].moments // 2
    failed = qlora(output, fault={"kind": "memory", "at": at, "of": of})
    assert failed.code == 3, failed.err
    for words in ("out of memory on the host", "budget", "held", "base weights", "would save most", "--resume"):
        assert words in failed.err
    assert qlora(output, "--resume").code == 0
    assert adapter(output) == adapter(finished[0])


def test_two_runs_in_one_folder_are_refused(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with (output / ".lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = qlora(output)
    assert refused.code == 2
    assert "another run is writing there (process 4711)" in refused.err


def test_output_that_cannot_be_made_is_refused(qlora: Forked, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = qlora(tmp_path / "file" / "run")
    assert refused.code == 2
    assert "Not a directory" in refused.err


BAD_DATA: dict[str, tuple[str, str]] = {
    "empty": ("", "no row"),
    "missing field": ('{"prompt": "a", "completion": "b"}\n{"promt": "a"}\n', ":2"),
    "not JSON": ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', ":2"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_stop_the_run_before_training(qlora: Forked, tmp_path: Path, name: str) -> None:
    text, says = BAD_DATA[name]
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    refused = qlora(tmp_path / "run", "--data", str(file))
    assert refused.code == 2, refused.err
    assert says in refused.err
    assert "bad.jsonl" in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize("flags", [("--data", "nowhere.jsonl"), ("--model", "./nowhere"), ("--targets", "q_porj")])
def test_what_is_not_there_is_named(qlora: Forked, tmp_path: Path, flags: tuple[str, str]) -> None:
    refused = qlora(tmp_path / "run", *flags)
    assert refused.code == 2, refused.err
    assert flags[1] in refused.err
    assert "Traceback" not in refused.err


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(40).unsqueeze(0)).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_the_merged_model_is_the_trained_one_or_says_what_it_is(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path, tiny_llama: Path
) -> None:
    import torch
    from peft import PeftModel

    from finetune import cli
    from finetune.model.load import load_base

    merged = {}
    for base in ("quantized-base", "full-base"):
        output = tmp_path / base
        outcome = qlora(output, "--merge", base, "--learning-rate", "0.02")
        assert outcome.code == 0, outcome.err
        assert f"into the {base}" in outcome.out
        assert json.loads((output / "summary.json").read_text())["merged_into"] == base
        merged[base] = logits(output / "merged")
    config = cli.parse([str(output / "config.yaml")])
    trained = PeftModel.from_pretrained(load_base(config.model), str(output / "adapter"))
    with torch.no_grad():
        expected = trained(torch.arange(40).unsqueeze(0)).logits
        untrained = load_base(config.model)(torch.arange(40).unsqueeze(0)).logits
    assert torch.allclose(merged["quantized-base"], expected, atol=1e-5)
    moved = (expected - untrained).abs().max()
    away = (merged["full-base"] - expected).abs().max()
    assert away > 1e-3
    assert moved > 1e-2


def test_all_weights_can_be_trained(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    outcome = qlora(output, "--full", "--precision", "fp32", "--max-steps", "4", "--optimizer", "adamw")
    assert outcome.code == 0, outcome.err
    assert (output / "model" / "model.safetensors").is_file()
    assert "--full" not in outcome.err


def test_a_constant_schedule_can_be_made_longer_and_tensorboard_gets_every_step_once(
    qlora: Forked, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    for flags in (("--max-steps", "3"), ("--max-steps", "5", "--resume")):
        outcome = qlora(output, "--tensorboard", "--schedule", "constant", *flags)
        assert outcome.code == 0, outcome.err
    shorter = qlora(output, "--schedule", "constant", "--max-steps", "4", "--resume")
    assert shorter.code == 2
    assert "max_steps = 4: 5 steps are done already" in shorter.err
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_run_that_failed_before_its_first_step_is_not_in_the_way(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert qlora(output, "--targets", "q_porj").code == 2
    assert qlora(output, "--max-steps", "1").code == 0


def test_overwriting_removes_nothing_before_the_new_run_can_start(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert qlora(output, "--max-steps", "1").code == 0
    before = adapter(output), (output / "config.yaml").read_text()
    assert qlora(output, "--overwrite", "--targets", "q_porj").code == 2
    assert (adapter(output), (output / "config.yaml").read_text()) == before


def test_the_trial_of_the_longest_batch_changes_nothing(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    flags = ("--dropout", "0.1")
    assert qlora(tmp_path / "with", *flags).code == 0
    without = qlora(tmp_path / "without", *flags, fault={"kind": "without", "at": 0, "of": "_try_longest"})
    assert without.code == 0, without.err
    assert without.moments != finished[1].moments  # it did run without it
    assert adapter(tmp_path / "with") == adapter(tmp_path / "without")


def test_how_often_is_saved_and_evaluated_changes_nothing(
    qlora: Forked, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    flags = ("--save-every", "0", "--eval-every", "0", "--answer-tokens", "0", "--keep", "1", "--no-checkpointing")
    outcome = qlora(tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    assert adapter(tmp_path / "run") == adapter(finished[0])


def test_a_loss_that_is_no_number_stops_the_run(qlora: Forked, tmp_path: Path) -> None:
    output = tmp_path / "run"
    failed = qlora(output, "--learning-rate", "1e38", "--clip", "0", "--warmup-steps", "0")
    assert failed.code == 5, failed.err
    assert "Lower --learning-rate" in failed.err
    for state in (output / "checkpoints").glob("step-*"):
        assert int(state.name.removeprefix("step-")) < 10
