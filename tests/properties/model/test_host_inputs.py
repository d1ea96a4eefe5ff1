"""Inputs that waited in host memory are the same bits, however late the copies are made, and little of them is left."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import make_rows, padded, tiny_model

from finetune.config.settings import TrainConfig
from finetune.errors import ModelError
from finetune.model import host_inputs
from finetune.model.forward import base_model, hidden_states
from finetune.model.host_copies import PlainCopies
from finetune.model.host_inputs import keeping_inputs_on_host
from finetune.model.recompute import layers_of, set_recompute
from finetune.training.accumulate import window_gradients

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
FEW = settings(max_examples=max(5, settings.default.max_examples // 10))
HIDDEN = 64
_models: dict[tuple[int, torch.dtype], Any] = {}


class LateCopies:
    """Copies in their order, each as late as it may be: when something waits for it.

    Memory of the card is held weakly, because the allocator hands it on as soon as the program drops it.
    """

    def __init__(self, most: float = float("inf")) -> None:
        self.most, self.allocated, self.freed, self.moved = most, 0, 0, 0
        self.pending: list[tuple[Any, Any]] = []
        self.done = 0

    def allocate(self, size: int) -> Tensor:
        if size > self.most:
            raise RuntimeError("no more")
        self.allocated += 1
        return torch.full((size,), 0xA5, dtype=torch.uint8)

    def free(self, buffers: list[Tensor]) -> None:
        self.wait(self.done + len(self.pending))
        self.freed += len(buffers)

    def start(self, target: Tensor, source: Tensor) -> int:
        to_host = target._base is not None
        self.moved += to_host
        self.pending.append((target, weakref.ref(source)) if to_host else (weakref.ref(target), source))
        return self.done + len(self.pending)

    def wait(self, mark: int) -> None:
        while self.done < mark:
            target, source = (one() if isinstance(one, weakref.ref) else one for one in self.pending.pop(0))
            assert target is not None, "the memory was handed on before it was written"
            assert source is not None, "the memory was handed on before it was read"
            target.copy_(source)
            self.done += 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    return with_copies(monkeypatch, LateCopies())


def with_copies(monkeypatch: pytest.MonkeyPatch, copies: LateCopies) -> LateCopies:
    monkeypatch.setattr(host_inputs, "_stores", {})
    monkeypatch.setattr(host_inputs, "copies_of", lambda _: copies)
    return copies


def model_of(layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    if (layers, dtype) not in _models:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        _models[layers, dtype] = get_peft_model(tiny_model(dtype=dtype, layers=layers, hidden=HIDDEN), config)
    return _models[layers, dtype]


def gradients(model: Any, lengths: list[list[int]], **changes: Any) -> tuple[Any, list[Tensor | None]]:
    model.zero_grad(set_to_none=True)
    window = [padded(make_rows(of, seed=number)) for number, of in enumerate(lengths)]
    stats = window_gradients(model, window, TrainConfig(**changes))
    return stats, [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(one: tuple[Any, list[Tensor | None]], other: tuple[Any, list[Tensor | None]]) -> None:
    assert one[0] == other[0]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FEW
@given(
    layers=st.integers(1, 4),
    count=st.integers(0, 4),
    lengths=st.lists(st.lists(st.integers(4, 12), min_size=1, max_size=3), min_size=1, max_size=4),
    plain=st.booleans(),
)
def test_losses_and_gradients_are_the_same_bits(
    dtype: torch.dtype, layers: int, count: int, lengths: list[list[int]], plain: bool
) -> None:
    model, recomputed = model_of(layers, dtype), min(count, layers)
    with pytest.MonkeyPatch.context() as patch:
        copies = with_copies(patch, LateCopies())
        if plain:
            patch.setattr(host_inputs, "copies_of", lambda _: PlainCopies())
        found = [
            gradients(model, lengths, checkpointing=recomputed, offload_activations=on_host)
            for on_host in (False, True, True)
        ]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])  # from buffers that were used before
    moves = 2 * len(lengths) * max(0, recomputed - 1)  # the last layer's input stays on the card
    assert copies.moved == (0 if plain else moves)


def test_of_all_that_layers_save_each_input_but_the_last_is_moved_once(late: LateCopies) -> None:
    model = model_of()
    set_recompute(model, "all")
    model.train()
    moved: list[tuple[Any, ...]] = []
    late.start = lambda target, source: moved.append((source.shape, source.data_ptr())) or 0  # type: ignore[method-assign,func-returns-value]  # noted only
    batch = padded(make_rows([5, 8]))
    with keeping_inputs_on_host(model):
        hidden_states(model, batch)
    assert [shape for shape, _ in moved] == [(2, 8, HIDDEN)] * 2
    assert len({address for _, address in moved}) == 2


def test_what_stays_on_the_card_is_one_input(late: LateCopies) -> None:
    """After the forward pass; a second one comes back while a layer goes backward."""
    model = model_of(4)
    set_recompute(model, "all")
    inputs: list[Any] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
        for layer in layers_of(model)
    ]
    model.train()
    batch = padded(make_rows([5, 8]))
    with keeping_inputs_on_host(model):
        states = hidden_states(model, batch).states
    gc.collect()
    for handle in handles:
        handle.remove()
    assert [one() is not None for one in inputs] == [False, False, False, False]
    (store,) = host_inputs._stores.values()
    on_card: list[int] = []
    own = store.arrived

    def counted(kept: Any) -> Tensor:
        found = own(kept)
        on_card.append(1 + len(store._coming))
        return found

    store.arrived = counted  # type: ignore[method-assign]  # watched
    states.sum().backward()
    assert on_card == [1, 1, 1, 1]  # and the next one is fetched after this
    assert not store._coming
    assert len(store._free) == 3


def test_host_memory_is_allocated_once_and_grows_for_longer_rows_only(late: LateCopies) -> None:
    model = model_of()
    run = {"checkpointing": "all", "offload_activations": True}
    gradients(model, [[12, 12], [4], [9]], **run)
    assert (late.allocated, late.freed) == (2, 0)
    gradients(model, [[12], [3, 3]], **run)
    assert (late.allocated, late.freed) == (2, 0)
    gradients(model, [[12, 12, 12]], **run)
    assert (late.allocated, late.freed) == (4, 2)  # in place of the smaller ones
    host_inputs.release()
    assert late.freed == 4


def test_after_an_interrupted_backward_pass_the_next_window_is_right(late: LateCopies) -> None:
    model = model_of()
    expected = gradients(model, [[7, 9]], checkpointing="all", offload_activations=False)
    set_recompute(model, "all")

    def interrupt(_: Tensor) -> None:
        raise MemoryError

    handle = layers_of(model)[1].register_forward_hook(lambda _, given, out: out.register_hook(interrupt) and None)
    with keeping_inputs_on_host(model):
        states = hidden_states(model, padded(make_rows([6, 6]))).states
    handle.remove()
    with pytest.raises(MemoryError):
        states.sum().backward()
    (store,) = host_inputs._stores.values()
    assert len(store._coming) == 1
    del states
    assert_same(expected, gradients(model, [[7, 9]], checkpointing="all", offload_activations=True))


def test_where_host_memory_is_short_the_inputs_stay_on_the_card_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = with_copies(monkeypatch, LateCopies(most=4 * 8 * HIDDEN))
    model = model_of()
    expected = gradients(model, [[8], [12, 12], [8]], checkpointing="all", offload_activations=False)
    assert_same(expected, gradients(model, [[8], [12, 12], [8]], checkpointing="all", offload_activations=True))
    said = capsys.readouterr().err
    assert said.count("the layers' inputs stay on the card") == 1
    assert "cannot be pinned for one of them: no more" in said
    assert copies.moved >= 2


def test_a_layer_that_writes_to_its_input_is_told_of(late: LateCopies) -> None:
    model = model_of()
    set_recompute(model, "all")

    def write(_: Any, given: tuple[Tensor, ...], __: Any) -> None:
        given[0].mul_(2)

    handle = layers_of(model)[0].register_forward_hook(write)
    try:
        with keeping_inputs_on_host(model), pytest.raises(ModelError, match="changes its input in place"):
            hidden_states(model, padded(make_rows([6, 6])))
    finally:
        handle.remove()


def test_nothing_is_left_of_the_wrapping(late: LateCopies) -> None:
    model = model_of()
    set_recompute(model, "all")
    before = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    with keeping_inputs_on_host(model):
        wrapped = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == before
    assert not set(map(id, wrapped)) & set(map(id, before))
    assert base_model(model).model.gradient_checkpointing
