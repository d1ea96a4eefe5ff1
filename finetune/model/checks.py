"""Checks what training assumes of a model, with a few tiny forward passes before the first step.

Architectures differ in these points, and a wrong assumption would give wrong results without an error:

* A token must not see the tokens after it.
* The chunked loss computes the logits itself, so it has to scale and cap them as the model does.
* Packing relies on positions to keep rows apart that share a sequence.
* A resumed run may split its window into other micro-batches, so a row's gradient must not depend on other rows.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from finetune.data.batches import Batch
from finetune.errors import ConfigError, ModelError, Problem
from finetune.model.forward import COMPUTE_DTYPE_ATTRIBUTE, base_model, computing, hidden_states, set_checkpointing
from finetune.model.loss import LogitRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

_SEEN = 5e-3  # tolerance for the states of tokens when later tokens change; the same kernels compute both
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""The errors that a model's own code raises for arguments that it was not written for."""
_ROW = 12  # tokens of a row, more than any convolution looks back on
_LOGITS = 1e-2  # the model rounds to its own dtype between the operations, and the loss does not
_TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-3)}
_HALF = (2e-2, 2.5e-1)
"""Two limits for the difference between hidden states of one row, as shares of their norm.

The first is for the row beside two different rows, the second for the row beside another row and alone. A row alone may
use other kernels, which round differently: with int8 layers the difference was 9% after 30 layers of bf16.
"""
_MIXED = 1e-3
"""The least difference, in 16 bits, that shows that rows mix. Of 190 tiny models, those that mix rows had 2.6e-3 or
more, and all others exactly 0."""
_NOISY = 3.0
"""As many times the difference that rows have in sequences of their own may be rounding, as where experts add up in any
order."""


@torch.no_grad()
def check_assumptions(model: nn.Module, *, packing: bool, checkpointing: bool = False) -> None:
    """Check the assumptions of this module. This changes nothing in the model and draws no random numbers.

    On a device that allocates and does not compute, every difference is 0, so that every check passes.

    Args:
        model: the loaded model, with or without adapter.
        packing: whether rows share sequences in the run.
        checkpointing: whether the run recomputes activations in the backward pass.

    Raises:
        ModelError: a token sees tokens after it, or the logits are not those of the head, scaled and capped as the
            config says.
        ConfigError: rows that share a sequence see each other, or do not begin at position 0; or the model has no
            checkpointing.
    """
    if checkpointing and not base_model(model).is_activation_checkpointing:
        check_checkpointing(model)
    with _mode(model, training=False):
        _check_causal(model)
        _check_logits(model)
        if packing:
            _check_packing(model)


@torch.no_grad()
def why_the_split_matters(model: nn.Module) -> str | None:
    """Return why the gradient of a window depends on how it is split into micro-batches, or None if it does not.

    A base whose config has dropout (as GPT-2's and OPT's have) trains with it, and each micro-batch draws new random
    numbers. This function does not change the model or the random generators.

    Args:
        model: the loaded model, with or without adapter.
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
    """Return the states of the random generators that a model on ``device`` uses."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def check_checkpointing(model: nn.Module) -> None:
    """Check that the layers of a model can recompute their activations.

    Raises:
        ConfigError: the model has no checkpointing, or fails with it.
    """
    ids = _row(model, 0)
    set_checkpointing(model, enabled=True)
    try:
        cuda = [ids.device.index] if ids.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda), _mode(model, training=True):
            hidden_states(model, Batch(input_ids=ids, labels=ids))
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        kind = base_model(model).config.model_type
        why = f"this {kind} model fails when its activations are recomputed ({type(error).__name__})"
        problem = Problem(field="checkpointing", value=True, why=why, remedy="use --no-checkpointing")
        raise ConfigError(problem) from error
    finally:
        set_checkpointing(model, enabled=False)


def _check_causal(model: nn.Module) -> None:
    ids = _row(model, 0)
    other = ids.clone()
    later = _ROW // 2
    other[:, later:] = _row(model, 1)[:, later:]
    with _rows_by_themselves(model):
        try:
            states = [hidden_states(model, Batch(input_ids=row, labels=row)).states[:, :later] for row in (ids, other)]
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            kind, what = base_model(model).config.model_type, str(error).strip().splitlines()
            raise ModelError(
                f"this {kind} model fails on a plain row of tokens as it is loaded ({type(error).__name__}: "
                f"{what[0] if what else 'no message'}). It cannot be trained here, or needs another --precision"
            ) from error
    before, after = states
    if _differ(after, before, min(_SEEN, _tolerances(model, before)[0])):
        raise ModelError(
            f"a token of this {base_model(model).config.model_type} model sees the tokens after it, so it would learn "
            "to copy the answer and not to predict it. Use a causal language model"
            + (" (is_decoder: true in its config.json)" if hasattr(base_model(model).config, "is_decoder") else "")
        )


def _check_logits(model: nn.Module) -> None:
    base = base_model(model)
    ids = _row(model, 0)
    states = hidden_states(model, Batch(input_ids=ids, labels=ids)).states
    with computing(model):
        theirs = base(input_ids=ids, use_cache=False).logits
        head = base.get_output_embeddings()
        ours = LogitRule.of(base.config).apply(head(states.to(next(head.parameters()).dtype)))
    if ours.shape != theirs.shape or _differ(ours, theirs, _LOGITS):
        raise ModelError(
            f"the logits of this {base.config.model_type} model are not its head's output, scaled and capped as known "
            "fields of its config say: the loss would be another than the model's own. It cannot be trained here"
        )


def _check_packing(model: nn.Module) -> None:
    why = why_rows_mix(model)
    if why is not None:
        kind = base_model(model).config.model_type
        raise ConfigError(
            Problem(field="packing", value=True, why=f"this {kind} model {why}", remedy="use --no-packing")
        )


@torch.no_grad()
def why_rows_mix(model: nn.Module) -> str | None:
    """Return why rows that share a sequence are not as they are alone, or None if they are.

    A batch of two sequences of two rows is tried, because a model may keep the rows of a single sequence apart and no
    others. The same rows in four sequences, whose tokens have the same order, show how far rounding goes. This function
    does not change the model.

    Args:
        model: the loaded model, with or without adapter.
    """
    first, other, second = (_row(model, number) for number in range(3))
    with _rows_by_themselves(model), _mode(model, training=False):
        alone = hidden_states(model, Batch(input_ids=second, labels=second)).states
        ids = torch.cat([first, second, other, second])
        apart = hidden_states(model, Batch(input_ids=ids, labels=ids)).states
        try:
            beside = _after(model, (first, other), second)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            return f"fails on rows that share a sequence ({type(error).__name__})"
    same, like_alone = _tolerances(model, alone)
    same = min(same, max(_MIXED, _NOISY * _difference(apart[1:2], apart[3:])))
    if _differ(beside[:1], beside[1:], same) or _differ(beside[:1], alone, like_alone):
        return "does not keep rows apart that share a sequence"
    return None


def _tolerances(model: nn.Module, states: Tensor) -> tuple[float, float]:
    """Return the two limits that are described at ``_HALF``, for the dtype that the model computes in."""
    computed = getattr(base_model(model), COMPUTE_DTYPE_ATTRIBUTE, None) or states.dtype
    return _TOLERANCES.get(computed, _HALF)


def _rows_by_themselves(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Make int8 layers compute each row independently; a model without them does not need bitsandbytes for it."""
    if not any(hasattr(module, "init_8bit_state") for module in model.modules()):
        return contextlib.nullcontext()
    from finetune.patches.bitsandbytes import rows_by_themselves

    return rows_by_themselves(model)


def _after(model: nn.Module, firsts: Sequence[Tensor], second: Tensor) -> Tensor:
    """Return the hidden states of a row, [sequences, t, h], when it is packed behind each of other rows."""
    ids = torch.cat([torch.cat([first, second], dim=1) for first in firsts])
    positions = torch.arange(_ROW).repeat(len(firsts), 2)
    batch = Batch(input_ids=ids.cpu(), labels=ids.cpu(), position_ids=positions)
    return hidden_states(model, batch.to(ids.device)).states[:, _ROW:]


def _row(model: nn.Module, number: int) -> Tensor:
    """Return token ids [1, t] that depend on ``number`` only."""
    words = base_model(model).get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(words, (1, _ROW), generator=generator)
    return ids.to(next(model.parameters()).device)


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether the two differ by more than ``tolerance``."""
    return _difference(found, expected) > tolerance


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, as a share of the norm of ``expected``; infinite if that alone is 0."""
    found, expected = found.double(), expected.double()
    difference, norm = float((found - expected).norm()), float(expected.norm())
    return difference / norm if norm else float("inf") if difference else 0.0
