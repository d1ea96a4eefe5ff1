"""What training assumes of a model, held against the model itself in a few tiny forward passes before the first step.

Two things differ from one architecture to the next, and both would be wrong in silence: what is done to the logits
after the head, which the chunked loss does by itself; and whether rows that share a sequence are kept apart by their
positions, which packing relies on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from finetune.data import Batch
from finetune.errors import ConfigError, ModelError, Problem
from finetune.forward import COMPUTE_DTYPE_ATTRIBUTE, base_model, computing, hidden_states
from finetune.loss import LogitRule

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
    was_training = model.training
    model.eval()
    try:
        _check_logits(model)
        if packing:
            _check_packing(model)
    finally:
        model.train(was_training)


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
    words = base_model(model).get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(words, (1, _ROW), generator=generator)
    return ids.to(next(model.parameters()).device)


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two tensors are further apart than a share of the second's norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm()) > tolerance * float(expected.norm())
