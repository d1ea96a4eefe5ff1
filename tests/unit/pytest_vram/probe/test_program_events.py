"""What is noted of a program's modules, with tensors on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_vram.probe.program_events import Notes, on_card

if TYPE_CHECKING:
    from collections.abc import Iterator


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.q_proj(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Any) -> Any:
        return self.mlp(self.self_attn(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.lm_head = nn.ModuleList([Layer(), Layer()]), nn.Linear(4, 8)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def notes() -> Iterator[Notes]:
    made = Notes(lambda tensor: (0, tensor.untyped_storage().data_ptr()))
    made.start()
    yield made
    made.stop()


def calls(notes: Notes) -> list[tuple[str, bool]]:
    return [(name, head) for _, kind, name, head in notes.marks.steps if kind == "enter"]


def test_a_part_of_a_layer_is_noted_and_what_is_in_it_counts_as_it(notes: Notes) -> None:
    Model()(torch.zeros(1, 4))
    assert calls(notes) == [
        ("Model", False),
        *((f"layers.{i}{part}", False) for i in range(2) for part in ("", ".self_attn", ".mlp")),
        ("lm_head", True),
    ]
    kinds = [kind for _, kind, _, _ in notes.marks.steps]
    assert kinds.count("enter") == kinds.count("leave") == 8


def test_a_part_that_is_called_by_itself_is_noted(notes: Notes) -> None:
    model = Model()
    model(torch.zeros(1, 4))
    before = len(calls(notes))
    model.layers[0].self_attn.q_proj(torch.zeros(1, 4))  # type: ignore[union-attr, operator]  # modules are found by name
    assert calls(notes)[before:] == [("Linear", False)]


def test_a_module_that_raises_is_left(notes: Notes) -> None:
    with pytest.raises(RuntimeError):
        Model()(torch.zeros(1, 5))
    kinds = [kind for _, kind, _, _ in notes.marks.steps]
    assert kinds.count("enter") == kinds.count("leave") > 0
    nn.Linear(4, 4)(torch.zeros(1, 4))
    assert calls(notes)[-1] == ("Linear", False)


def test_an_id_that_is_given_again_is_another_module(notes: Notes) -> None:
    for width in (3, 4, 5):
        nn.Linear(width, width)(torch.zeros(1, width))
    weights = [label for label in notes.marks.labels if label[3] == "weights"]
    assert len(weights) == 6


def test_parameters_gradients_and_states_are_labelled(notes: Notes) -> None:
    model = Model()
    model.layers.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters())
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    found = {(category, module) for _, _, _, category, module in notes.marks.labels}
    assert ("weights", "layers.0.mlp") in found
    assert ("adapters", "lm_head") in found  # trained beside frozen ones
    assert ("gradients", "lm_head") in found
    assert ("optimizer", "") in found
    assert {device for _, device, *_ in notes.marks.labels} == {0}


def test_whoever_patches_on_top_keeps_a_patch_that_only_passes_on() -> None:
    original = nn.Module.__call__
    notes = Notes(lambda tensor: None)
    notes.start()
    ours = nn.Module.__call__
    theirs = nn.Module.__call__ = lambda self, *args: ours(self, *args)  # type: ignore[method-assign]  # the patch is what is tested
    try:
        notes.stop()
        assert nn.Module.__call__ is theirs
        Model()(torch.zeros(1, 4))
        assert notes.marks.steps == []
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]  # the patch is what is tested


def test_a_compiled_model_stays_in_one_graph(notes: Notes) -> None:
    compiled = torch.compile(Model(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1, 4)).shape == (1, 8)
    assert [name for name, _ in calls(notes)] == ["OptimizedModule"]


def labelled(notes: Notes, category: str) -> set[int]:
    return {address for _, _, address, kind, _ in notes.marks.labels if kind == category}


def test_a_module_that_is_never_called_is_met(notes: Notes) -> None:
    model = Model()
    notes.meet(model)
    model.layers[0](torch.zeros(1, 4))
    assert labelled(notes, "weights") == {parameter.data_ptr() for parameter in model.parameters()}
    assert [name for name, _ in calls(notes)] == ["layers.0", "layers.0.self_attn", "layers.0.mlp"]


def test_a_gradient_that_is_moved_away_within_the_backward_pass_is_labelled(notes: Notes) -> None:
    layer, seen = nn.Linear(4, 4), set()
    notes.meet(layer)

    def move(parameter: Any) -> None:
        seen.add(parameter.grad.untyped_storage().data_ptr())
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    layer(torch.ones(1, 4)).sum().backward()
    assert len(seen) == 2
    assert labelled(notes, "gradients") == seen
    notes.stop()
    before = len(notes.marks.labels)
    layer(torch.ones(1, 4)).sum().backward()
    assert len(notes.marks.labels) == before  # no hook is left


def test_constants_of_quantized_weights_are_found_where_they_are_kept(notes: Notes) -> None:
    def state(inner: Any = None) -> Any:
        return SimpleNamespace(absmax=torch.zeros(3), code=torch.zeros(4), offset=None, state2=inner)

    class Packed(nn.Parameter):
        quant_state: Any = None
        SCB: Any = None

    four_bits, before_use, after_use, experts = (nn.Module() for _ in range(4))
    four_bits.weight = Packed(torch.zeros(2), requires_grad=False)
    four_bits.weight.quant_state = state(state())
    before_use.weight = Packed(torch.zeros(2), requires_grad=False)
    before_use.weight.SCB = torch.zeros(2)
    after_use.state = SimpleNamespace(SCB=torch.zeros(2))  # type: ignore[assignment]  # made-up states
    experts.quant_states = {"up_proj": [state(), state(state())]}  # type: ignore[assignment]  # made-up states
    for module, count in ((four_bits, 4), (before_use, 1), (after_use, 1), (experts, 6)):
        known = len([label for label in notes.marks.labels if label[3] == "quantization"])
        notes.meet(nn.Sequential(module))
        found = [label for label in notes.marks.labels if label[3] == "quantization"][known:]
        assert len({address for _, _, address, _, _ in found}) == count


def test_a_module_with_a_state_of_its_own_is_met(notes: Notes) -> None:
    nested, foreign = nn.Linear(2, 2), nn.Linear(2, 2)
    nested.state = SimpleNamespace(code=None)  # type: ignore[assignment]  # made-up states
    nested.state.state2 = SimpleNamespace(code=torch.zeros(1))  # type: ignore[union-attr, assignment]  # made-up states
    foreign.state = SimpleNamespace(code=torch.zeros(1))  # type: ignore[assignment]  # made-up states
    notes.meet(nn.Sequential(nested, foreign))
    assert len(labelled(notes, "weights")) == 4
    assert labelled(notes, "quantization") == set()


class Block:
    """Stands for a CUDA tensor that begins where its storage does."""

    is_cuda = True

    def get_device(self) -> int:
        return 1

    def storage_offset(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return 4096


class Sharded:
    """Stands for a DTensor: it has no memory of its own, and an error for whoever asks for its address."""

    def to_local(self) -> Block:
        return Block()

    def get_device(self) -> int:
        raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")


@pytest.mark.parametrize("kind", [Block, Sharded])
def test_the_block_of_a_sharded_tensor_is_that_of_its_part_on_this_rank(kind: Any) -> None:
    assert on_card(kind()) == (1, 4096)
