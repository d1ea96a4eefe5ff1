"""Chooses on this card how the rows of a step are split, which layers recompute, and where their inputs wait.

The gradient of a step does not depend on these, up to rounding, but its speed does: a card that works on one row at a
time waits for the host most of the time, and a layer that recomputes goes forward twice. So a run takes the choice that
is estimated to be the fastest, of those for which there is room. Of two that are as fast it takes the leaner one: the
inputs of layers that recompute wait on the host, unless the copies are estimated to take time.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.config import yaml_file
from finetune.config.recompute import layers_recomputed, place_is_open
from finetune.data.batches import longest_window
from finetune.estimate.card_speed import speed_of
from finetune.estimate.choice import Choice, Forecast, Tried, choices, choose, micro_batches
from finetune.kernels.fused_adapter import forget
from finetune.model import host_inputs
from finetune.model.checks import why_the_split_matters
from finetune.model.forward import base_model
from finetune.model.parts import is_sharded
from finetune.model.recompute import layers_of
from finetune.training import host_gradients, ranks
from finetune.training.accumulate import window_gradients
from finetune.training.optim import state_bytes
from pytest_vram import torch_private
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from torch import nn

    from finetune.config.settings import RunConfig
    from finetune.data.batches import Rows

MARGIN = 0.03
"""Share of the card that has to stay free beside the longest rows, because memory becomes fragmented over time."""


_LAYERS = ("checkpointing", "offload_activations")


def as_recorded(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a resumed run with the choices that it began with, unless others are asked for.

    Args:
        config: the settings as they were given.
        recorded: the settings in the checkpoint, by name.
    """
    kept: dict[str, Any] = {}
    split = {"micro_batch": int(recorded["micro_batch"]), "accumulation": int(recorded["accumulation"])}
    same = split["micro_batch"] * split["accumulation"] == config.train.micro_batch * config.train.accumulation
    if config.train.split == "auto" and same:
        kept |= split
    kept |= {name: recorded[name] for name in _LAYERS if name in recorded and getattr(config.train, name) == "auto"}
    if kept.get("checkpointing") == "none" and config.train.offload_activations is True:
        del kept["checkpointing"]  # the resumed run asks for inputs on the host, which only recomputed layers have
    return yaml_file.replace(config, kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a run takes on this card."""

    config: RunConfig
    """The settings with the choice."""
    note: str | None = None
    """What the user is told of the choice; None if there was none."""
    spare: int | None = None
    """Bytes that a trial of the choice left free, in the rank with the least; None if it was not tried."""


def chosen_split(model: nn.Module, train: Rows, config: RunConfig) -> Split:
    """Choose micro-batches, recomputed layers and the place of their inputs, as far as the settings leave them open.

    Each micro-batch divides the rows of a step. A choice is tried with the longest rows of the data, beside the
    optimizer's states and :data:`MARGIN`. Several ranks take the same choice, which fits in each of them. Afterwards
    there are no gradients, and the caller has to restore the random generators.

    Args:
        model: with its adapter, on its device. On a CPU larger micro-batches are no faster, so nothing is changed.
        train: the training rows.
        config: the settings of the run.
    """
    now, device = config.train, next(model.parameters()).device
    rows = now.micro_batch * now.accumulation
    split_open = now.split == "auto" and rows > 1
    layers_open = now.checkpointing == "auto"
    place_open = place_is_open(now)
    if device.type != "cuda" or not (split_open or layers_open or place_open):
        return Split(config=config)
    if is_sharded(model):  # its layers are gathered by all ranks: one without room would leave the others waiting
        why = "over a sharded base neither these nor the recomputed layers are chosen"
        note = f"micro-batches of {now.micro_batch}, as set: {why} (--micro-batch, --checkpointing)"
        return Split(config=config, note=note)
    reason = why_the_split_matters(model) if split_open else None
    sizes = [now.micro_batch] if reason or not split_open else micro_batches(rows, processes=len(ranks.gathered(0)))
    layers = max(1, len(layers_of(model)))  # 1: a model that recomputes all layers or none
    recomputed = range(layers + 1) if layers_open else [layers_recomputed(now.checkpointing, layers)]
    forecast = _forecast(model, train, config, device)
    offered = choices(config, sizes, recomputed, layers, forecast)
    spare = None
    told = [] if reason is None else [_told_of_split(now.micro_batch, reason)]
    if len(offered) == len(offered[0]) == 1:
        choice = offered[0][0]
    else:
        trials = _Trials(model, train, config, device, forecast)
        chosen = choose(offered, trials.budget, trials.attempt, forecast)
        choice = chosen.choice
        spare = trials.budget - chosen.needed if chosen.fits else 0
        if len(sizes) > 1 or layers_open:
            told.insert(0, _told(choice, split=len(sizes) > 1, layers=layers_open, fits=chosen.fits))
    if place_open and choice.recomputed > 1:  # the input of the last layer that recomputes stays on the card
        told.append(_told_of_place(choice))
    return Split(config=yaml_file.replace(config, choice.settings), note="; ".join(told) or None, spare=spare)


def keep_gradients(model: nn.Module, train: Rows, split: Split) -> str | None:
    """Let the gradients of earlier micro-batches stay on the card, instead of in host memory, if there is room.

    Room is what the longest rows of the data leave, beside the optimizer's states and :data:`MARGIN`. Several ranks do
    the same. Afterwards there are no gradients, and the caller has to restore the random generators.

    Args:
        model: with its adapter, on its device.
        train: the training rows.
        split: what the run takes. If it was not tried, it is tried here.

    Returns:
        A note for the user; None if no gradients would wait on the host.
    """
    setattr(model, host_gradients.ON_CARD, False)
    now = split.config.train
    if now.accumulation == 1 or is_sharded(model) or not host_gradients.wanted(model, now):
        return None
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    spare = split.spare
    if spare is None:
        trials = _Trials(model, train, split.config, next(model.parameters()).device, None)
        spare = trials.budget - max(ranks.gathered(trials.needed)) if trials.fits({}) else 0
    stay = size <= spare
    setattr(model, host_gradients.ON_CARD, stay)
    where = "stay on the card, which has room for them" if stay else "wait in host memory"
    return f"the gradients of a step's earlier micro-batches ({size / MIB:,.0f} MiB) {where}"


def _forecast(model: nn.Module, train: Rows, config: RunConfig, device: torch.device) -> Forecast | None:
    """Return what the arithmetic says of rows as long as the longest; None if it does not know the model."""
    card = torch.cuda.get_device_properties(device)
    # Ranks on cards of several kinds have to come to the same choice.
    name, capability, count = ranks.of_first((card.name, (card.major, card.minor), card.multi_processor_count))
    longest = {"seq": int(train.sequence_lengths().max()), "device": "cuda"}
    return Forecast.of(
        yaml_file.replace(config, longest),
        base_model(model).config.to_dict(),
        speed_of(name, capability, count),
        capability=capability,
        ranks=len(ranks.gathered(0)),
    )


class _Trials:
    """Tries choices on this rank's card, and agrees with the other ranks on what fits.

    Attributes:
        budget: the most bytes that a choice may need, comparable with the forecast, in the rank with the least.
        needed: the bytes that the latest trial needed in this rank, comparable with the budget.
    """

    def __init__(
        self, model: nn.Module, train: Rows, config: RunConfig, device: torch.device, forecast: Forecast | None
    ) -> None:
        self._model, self._train, self._config, self._device = model, train, config, device
        _tidy(model)  # a trial measures its own peak, and not that of loading
        free, total = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device) - int(MARGIN * total)
        self._share = room / total
        self.needed = 0
        # The memory of what is loaded is measured, and not forecast.
        loaded = max(ranks.gathered(torch.cuda.memory_allocated(device)))
        self._beside = loaded - forecast.loaded() if forecast is not None else 0
        self.budget = min(ranks.gathered(room - self._beside))

    def attempt(self, choice: Choice) -> Tried:
        fits = self.fits(choice.settings)
        return Tried(fits=fits, needed=max(ranks.gathered(self.needed)))

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a window with these settings fits in every rank, and tidy up."""
        fits = self._run(yaml_file.replace(self._config, settings))
        self.needed = torch.cuda.max_memory_reserved(self._device) - self._beside
        _tidy(self._model)
        return not ranks.any_of(not fits)

    def _run(self, config: RunConfig) -> bool:
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        states = state_bytes(trained, config.train, masters=not config.adapter.full)
        try:
            with _at_most(self._share, self._device), ranks.alone():
                held = torch.empty(states, dtype=torch.uint8, device=self._device)
                window_gradients(self._model, longest_window(self._train, config.train), config.train)
                torch.cuda.synchronize(self._device)
                del held
        except torch.OutOfMemoryError:
            return False
        return True


@contextlib.contextmanager
def _at_most(share: float, device: torch.device) -> Iterator[None]:
    """Let the allocator take no more than this share of the card's memory, or than it may already take, in this block.

    A block of memory that is held instead would do as well, but would count in every figure of the run's peak.
    """
    before = torch_private.memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(share, before)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _told(choice: Choice, *, split: bool, layers: bool, fits: bool) -> str:
    """Return the note that says what was chosen, and why.

    Args:
        choice: what was chosen.
        split: whether there was a choice of micro-batches.
        layers: whether there was a choice of layers.
        fits: whether it fits; otherwise it is the leanest choice.
    """
    told = []
    if split:
        rows = choice.micro_batch * choice.accumulation
        told.append(f"the {rows} rows of a step are computed in micro-batches of {choice.micro_batch}")
    if layers and choice.recomputed in (0, choice.layers):
        told.append("every layer recomputes its activations" if choice.recomputed else "no layer recomputes anything")
    elif layers:
        told.append(f"{choice.recomputed} of {choice.layers} layers recompute their activations")
    why = "estimated to be the fastest for which there is room" if fits else "there is room for nothing larger"
    return f"{', and '.join(told)}: {why}"


def _told_of_split(micro_batch: int, reason: str) -> str:
    return f"micro-batches of {micro_batch}: {reason}, so that the split is not changed"


def _told_of_place(choice: Choice) -> str:
    if choice.on_host:
        return "the inputs of the layers that recompute wait in host memory (--offload-activations)"
    return "their inputs stay on the card, because copies are estimated to take time (--no-offload-activations)"


def _tidy(model: nn.Module) -> None:
    """Free the memory that loading or a trial left, and reset the peak, which is not that of what follows."""
    for parameter in model.parameters():
        parameter.grad = None
    forget(model)
    gc.collect()
    host_inputs.release()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
