"""Which kernels a model gets: all of them on a card, none on a CPU, and a refusal where one was asked for in vain."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.kernels import choice
from finetune.model.loss import KERNEL

pytest.importorskip("peft")


class OnCard(nn.Module):
    """A model that says that it lies on a card."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([torch.empty(1, device="meta").as_subclass(_Card)])

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class _Card(torch.Tensor):
    device = torch.device("cuda")  # type: ignore[assignment]  # a stand-in's device


def config(kind: str, **fields: Any) -> Any:
    class Config:
        model_type = kind

        def get_text_config(self) -> Any:
            return self

    made: Any = Config()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def on_card(kind: str = "llama", **fields: Any) -> Any:
    model: Any = OnCard()
    model.head = nn.Linear(1, 1)
    model.config = config(kind, **{"hidden_act": "silu"} | fields)
    return model


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kernel_runs_on", lambda device: device.type == "cuda")
    monkeypatch.setattr(choice, "can_launch", lambda: True)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What liger-kernel is asked to patch."""
    try:
        patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except (ImportError, RuntimeError) as error:  # the Triton of torch 2.6 asks for a GPU as it is imported
        pytest.skip(f"liger-kernel cannot be imported: {error}")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(patch, "_apply_liger_kernel_to_instance", lambda model, **named: calls.append(named))
    return calls


def test_a_model_on_a_card_gets_norms_rotations_and_gates_but_no_loss(applied: list[dict[str, Any]]) -> None:
    model = on_card()
    assert "norms, rotations and gates" in " ".join(choice.set_kernels(model, "auto"))
    assert choice.set_kernels(model, "auto") == []  # once
    (named,) = applied
    assert {name for name, wanted in named.items() if wanted} == {"rope", "rms_norm", "swiglu"}
    assert named["fused_linear_cross_entropy"] is named["cross_entropy"] is False


def test_the_loss_runs_in_a_kernel_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "liger_is_installed", lambda: False)
    model = on_card()
    choice.set_kernels(model, "torch")
    assert not hasattr(model.head, KERNEL)
    choice.set_kernels(model, "auto")
    assert getattr(model.head, KERNEL).__name__ == "losses_and_gradient"
    monkeypatch.setattr(choice, "kernel_runs_on", lambda device: False)
    without = on_card()
    choice.set_kernels(without, "auto")
    assert not hasattr(without.head, KERNEL)


def test_the_gates_of_a_mixture_are_its_experts_own(applied: list[dict[str, Any]]) -> None:
    choice.set_kernels(on_card("mixtral", num_local_experts=8), "auto")
    (named,) = applied
    assert {name for name, wanted in named.items() if wanted} == {"rope", "rms_norm"}


@pytest.mark.parametrize(
    ("fields", "gate"),
    [
        ({"hidden_act": "swish"}, {"swiglu"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"geglu"}),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {"geglu"}),
        ({"hidden_act": "gelu"}, set()),
        ({"hidden_act": "relu"}, set()),
        ({"hidden_act": None}, set()),
    ],
)
def test_a_gate_computes_the_activation_of_the_model(
    fields: dict[str, Any], gate: set[str], applied: list[dict[str, Any]]
) -> None:
    (said,) = choice.set_kernels(on_card(**fields), "auto")
    (named,) = applied
    assert {name for name, wanted in named.items() if wanted} == {"rope", "rms_norm"} | gate
    assert ("gates" in said) is bool(gate)


def test_a_card_on_which_no_kernel_can_be_compiled_gets_none(
    applied: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "kernel_runs_on", lambda device: False)
    monkeypatch.setattr(choice, "can_launch", lambda: False)
    (said,) = choice.set_kernels(on_card(), "auto")
    assert "no C compiler" in said
    assert applied == []
    monkeypatch.setattr(choice, "liger_is_installed", lambda: True)
    with pytest.raises(ConfigError, match="no C compiler"):
        choice.check_kernels("liger", torch.device("cuda"))


def test_an_architecture_that_liger_does_not_know_is_told(applied: list[dict[str, Any]]) -> None:
    (said,) = choice.set_kernels(on_card("gpt2"), "auto")
    assert "no kernels for gpt2" in said
    assert applied == []


def test_torch_means_torch(applied: list[dict[str, Any]]) -> None:
    assert choice.set_kernels(on_card(), "torch") == []
    assert choice.set_kernels(nn.Linear(2, 2), "auto") == []  # on a CPU
    assert applied == []


def test_without_liger_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "liger_is_installed", lambda: False)
    assert choice.set_kernels(on_card(), "auto") == []


@pytest.mark.parametrize(
    ("installed", "device", "why"),
    [(False, "cuda", "not installed"), (True, "cpu", "needs a GPU"), (True, "cuda", None)],
)
def test_liger_asked_for_in_vain_is_refused(
    installed: bool, device: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "liger_is_installed", lambda: installed)
    choice.check_kernels("auto", torch.device(device))
    if why is None:
        choice.check_kernels("liger", torch.device(device))
        return
    with pytest.raises(ConfigError, match=why):
        choice.check_kernels("liger", torch.device(device))


def test_the_extra_brings_liger() -> None:
    assert json.dumps("liger-kernel")[1:-1] in (Path(__file__).parents[4] / "pyproject.toml").read_text()
    assert choice.liger_is_installed() == (importlib.util.find_spec("liger_kernel") is not None)
