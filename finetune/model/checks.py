"""What training assumes of a model, held against the model itself in a few tiny forward passes before the first step.

Three things differ from one architecture to the next, and each would be wrong in silence: what is done to the logits
after the head, which the chunked loss does by itself; whether rows that share a sequence are kept apart by their
positions, which packing relies on; and whether a row's gradient depends on the rows beside it in its micro-batch, which
a run that goes on with its window split another way relies on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.batches import Batch
from finetune.errors import ConfigError, ModelError, Problem
from finetune.model.forward import COMPUTE_DTYPE_ATTRIBUTE, base_model, computing, hidden_states
from finetune.model.loss import LogitRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

_ROW = 12  # tokens of a row: longer than any convolution looks back
_LOGITS = 1e-2  # the model rounds to its own dtype between the operations, the loss does not
_TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-3)}
_HALF = (2e-2, 2.5e-1)
"""How far apart the states of one row may be beside two others, and beside another and alone: a share of the norm.

Alone, other kernels round elsewhere: int8 layers made that 9% in 30 layers of bf16.
"""


@torch.no_grad()
def check_assumptions(model: nn.Module, *, packing: bool) -> None:
    """Hold the model to what is assumed of it. Leaves it as it was; draws no random number.

    On a device that allocates and does not compute, every difference is 0.

    Args:
        model: loaded, with or without adapter.
        packing: whether rows are to share sequences.

    Raises:
        ModelError: its logits are not the head's, scaled and capped as its config says.
        ConfigError: rows that share a sequence see each other, or do not begin at position 0.
    """
    with _mode(model, training=False):
        _check_logits(model)
        if packing:
            _check_packing(model)


@torch.no_grad()
def why_the_split_matters(model: nn.Module) -> str | None:
    """Why the same window, split into other micro-batches, is another gradient; None where it is not.

    A base with dropout of its own (GPT-2's and OPT's configs have it) trains with it, and each micro-batch draws anew.
    Leaves the model and every generator as they were.

    Args:
        model: loaded, with or without adapter.
    """
    base = base_model(model)
    if getattr(base.config, "output_router_logits", False):
        return f"the router's loss of this {base.config.model_type} model is one of whole micro-batches"
    ids = _row(model, 0)
    cuda = [ids.device.index] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), _mode(model, training=True):
        before = _generators(ids.device)
        hidden_states(model, Batch(input_ids=ids, labels=ids))
        drew = any(not torch.equal(a, b) for a, b in zip(before, _generators(ids.device), strict=True))
    return (
        f"this {base.config.model_type} model has dropout of its own, drawn anew for each micro-batch" if drew else None
    )


@contextlib.contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the generators that a model on ``device`` draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _check_logits(model: nn.Module) -> None:
    base = base_model(model)
    ids = _row(model, 0)
    states = hidden_states(model, Batch(input_ids=ids, labels=ids)).states
    with computing(model):
        theirs = base(input_ids=ids, use_cache=False).logits
        ours = LogitRule.of(base.config).apply(base.get_output_embeddings()(states))
    if _differ(ours, theirs, _LOGITS):
        raise ModelError(
            f"the logits of this {base.config.model_type} model are not its head's output, scaled and capped as known "
            "fields of its config say: the loss would be another than the model's own. It cannot be trained here"
        )


def _check_packing(model: nn.Module) -> None:
    first, other, second = (_row(model, number) for number in range(3))
    with _rows_of_their_own(model):
        alone = hidden_states(model, Batch(input_ids=second, labels=second)).states
        beside = [_after(model, row, second) for row in (first, other)]
    computed = getattr(base_model(model), COMPUTE_DTYPE_ATTRIBUTE, None) or alone.dtype
    same, like_alone = _TOLERANCES.get(computed, _HALF)
    if _differ(beside[0], beside[1], same) or _differ(beside[0], alone, like_alone):
        raise ConfigError(
            Problem(
                field="packing",
                value=True,
                why=f"this {base_model(model).config.model_type} model does not keep rows apart that share a sequence",
                remedy="use --no-packing",
            )
        )


@contextlib.contextmanager
def _rows_of_their_own(model: nn.Module) -> Iterator[None]:
    """Have int8 layers compute each row by itself: LLM.int8() takes 16 bits for all where one has a large value."""
    states: list[Any] = [module.state for module in model.modules() if hasattr(module, "init_8bit_state")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def _after(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The second row's hidden states, packed behind the first."""
    ids = torch.cat([first, second], dim=1)
    positions = torch.arange(_ROW, device=ids.device).repeat(2)[None]
    return hidden_states(model, Batch(input_ids=ids, labels=ids, position_ids=positions)).states[:, _ROW:]


def _row(model: nn.Module, number: int) -> Tensor:
    """Token ids [1, t], another row for each number."""
    words = base_model(model).get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(words, (1, _ROW), generator=generator)
    return ids.to(next(model.parameters()).device)


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors are further apart than a share of the second's norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm()) > tolerance * float(expected.norm())
