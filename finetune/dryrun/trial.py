"""Takes training steps at full size, and measures them on the device that torch sees: a dry GPU, or a real one.

The weights of the model are not needed. The real loading code loads a checkpoint of zeros that takes no disk space.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import TYPE_CHECKING, Any, Self

from finetune import launch
from finetune.config import yaml_file
from finetune.dryrun import assumptions
from finetune.dryrun.full_rows import FullRows
from finetune.dryrun.messages import Trial
from finetune.dryrun.recording import StepRecorder
from pytest_vram import torch_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import nn

    from finetune.config.settings import RunConfig
    from finetune.data.batches import Batch
    from finetune.dryrun.recording import TrialRecorder

MOST_MICRO_BATCHES = 2
"""How many micro-batches of a window are run. A test shows that further ones add nothing to the peak."""
PACKED_ROWS = 2
"""How many rows share a sequence with --packing. More rows differ by the rounding of the allocator alone."""


class Bench:
    """Loads a base model once, and tries several settings on it.

    Attributes:
        refused: the trial of loading the base, if it did not fit, so that nothing else can be tried; else None.
    """

    def __init__(self, config: RunConfig, folder: Path, recorder: TrialRecorder | None = None) -> None:
        import torch

        from finetune.dryrun.trial_data import tokenizer_of
        from finetune.model.embeddings import resize_embeddings, tables_of
        from finetune.model.load import load_base
        from finetune.model.recompute import layers_of
        from pytest_vram.drygpu import empty_checkpoint

        self.torch, self.recorder = torch, recorder
        self.begin = time.perf_counter()
        self.phases: dict[str, int] = {}
        self.packed, self._apart = 1, False
        self.managed_before = 0
        shape = model_config(config.model.model)
        shape.dtype = "bfloat16"
        if hasattr(shape, "quantization_config"):
            del shape.quantization_config  # the zeros are not quantized; --precision says already how to store them
        checkpoint = empty_checkpoint(shape, folder)
        self.vocabulary = int(shape.get_text_config().vocab_size)
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.product, self.multiprocessors = card.name, card.multi_processor_count
        self.capability = torch.cuda.get_device_capability()
        self.refused: Trial | None = None
        self.loading_peaks = (0, 0)  # reserved, and on the device; later trials over this base have them too
        try:
            with self._phase("loading"):
                here = dataclasses.replace(config.model, model=str(checkpoint), resize_embeddings=False)
                self.base = load_base(here)
                if config.model.resize_embeddings and (tokenizer := tokenizer_of(config)) is not None:
                    resize_embeddings(self.base, len(tokenizer))
                self.positions = tables_of(self.base).positions
            self.layers = len(layers_of(self.base))
        except torch.OutOfMemoryError as error:
            self.refused = self._result(str(error), {})
        self.context_bytes = _driver_figures(torch)[1]
        self.loading_peaks = torch.cuda.max_memory_reserved(), _driver_figures(torch)[0]

    def run(self, config: RunConfig, *, steps: int = 2, attributed: bool = True) -> Trial:
        """Attach the adapter, and take steps. If memory runs out, the trial ends and says so.

        Args:
            config: the settings. Those of the model must be the ones with which the base was loaded.
            steps: number of steps; from the second on, the optimizer has state.
            attributed: record the last step, to find what the bytes at its peak are used for.
        """
        return self._run(config, steps=steps, attributed=attributed, choose=False)

    def run_chosen(self, config: RunConfig) -> Trial:
        """Choose what the settings leave open of the split and of the recomputed layers, and take steps with that.

        A run on this card chooses in the same way, with rows of its data in place of rows of ``--seq`` tokens.
        """
        return self._run(config, steps=2, attributed=True, choose=True)

    def _run(self, config: RunConfig, *, steps: int, attributed: bool, choose: bool) -> Trial:
        torch = self.torch
        message, note = "", ""
        model, optimizer, categories = None, None, {}
        try:
            model, optimizer = self._prepare(config)
            if choose:
                config, note = self._choose(config, model)
            if config.data.packing:
                self.packed = self._fuller(config, model, optimizer)
            for step in range(steps):
                if attributed and step == steps - 1:
                    categories = self._recorded_step(config, model, optimizer)
                else:
                    self._step(config, model, optimizer)
                if step:
                    self._evaluate(config, model)
        except torch.OutOfMemoryError as error:
            message = str(error)
        result = self._result(message, categories)
        if choose:
            names = ("micro_batch", "accumulation", "checkpointing", "offload_activations")
            chosen = {name: getattr(config.train, name) for name in names} | {"split": "given"}
            result = dataclasses.replace(result, chosen=chosen, note=note)
        self._clean(model, optimizer)
        return result

    def _fuller(self, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Return how many rows share a sequence in the step that takes the most memory, after a step with each.

        Where rows attend one after the other, several rows leave more tensors than one that fills its sequence, but
        each needs a smaller mask.
        """
        peaks = {}
        for rows in (1, PACKED_ROWS):
            self.packed = rows
            peaks[rows] = self._step(config, model, optimizer)
        return max(peaks, key=lambda rows: (peaks[rows], rows))

    def _choose(self, config: RunConfig, model: nn.Module) -> tuple[RunConfig, str]:
        from finetune.model.recompute import usable
        from finetune.training.split import chosen_split, keep_gradients

        checkpointing, told = usable(model, config.train.checkpointing)
        config = yaml_file.replace(config, {"checkpointing": checkpointing})
        rows = self._rows(config)
        split = chosen_split(model, rows, config)
        gradients = keep_gradients(model, rows, split)
        self._forget_peaks()
        return split.config, "; ".join(text for text in (told, split.note, gradients) if text)

    def _prepare(self, config: RunConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
        from finetune.kernels.choice import set_kernels
        from finetune.kernels.packed_attention import keep_rows_apart
        from finetune.model.load import attach_adapter
        from finetune.training.sharded import optimizer_of, spread

        with self._phase("adapter"):
            model = attach_adapter(self.base, config.adapter, seed=config.train.seed)
            spread(model, config)
            optimizer = optimizer_of(model, config.train)
        self.packed = PACKED_ROWS if config.data.packing else 1
        if config.data.packing and not self._apart:  # attention is wrapped once on each base
            self._apart = True
            set_kernels(model, config.train.kernels)
            keep_rows_apart(model)
            self._forget_peaks()
        if self.recorder is not None:
            self.recorder.meet(model)
        return model, optimizer

    def _recorded_step(self, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Take a step. Return the bytes at its peak by category."""
        with StepRecorder(model) as recorder:
            peak = self._step(config, model, optimizer)
            return recorder.at_peak(peak)

    def _step(self, config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take a step. Return its peak in allocated bytes."""
        from finetune.training.accumulate import window_gradients
        from finetune.training.optim import optimizer_step
        from finetune.training.step import clip_gradients

        with self._phase("forward and backward") as backward:
            window_gradients(model, list(self._window(config)), config.train)
        with self._phase("update") as update:
            clip_gradients([p for p in model.parameters() if p.grad is not None], config.train.clip)
            optimizer_step(optimizer)
        model.zero_grad(set_to_none=True)
        return max(backward.peak, update.peak)

    def _evaluate(self, config: RunConfig, model: nn.Module) -> None:
        from finetune.training.step import evaluate

        with self._phase("evaluation"):
            evaluate(model, list(self._window(config))[:1], config.train)

    def _window(self, config: RunConfig) -> Iterator[Batch]:
        """Yield this rank's micro-batches of a window: rows as long as the settings and the model's positions allow.

        Every token is a target.
        """
        from finetune.training import ranks

        batch = self._rows(config).batch([0] * config.train.micro_batch)
        for _ in ranks.share(range(config.train.accumulation))[:MOST_MICRO_BATCHES]:
            yield batch

    def _rows(self, config: RunConfig) -> FullRows:
        seq = config.data.seq if self.positions is None else min(config.data.seq, self.positions)
        return FullRows(
            count=config.train.micro_batch * config.train.accumulation,
            tokens=seq,
            vocabulary=self.vocabulary,
            packed=self.packed,
        )

    def _phase(self, name: str) -> _Phase:
        return _Phase(self.torch, self.phases, name, self.recorder)

    def _result(self, message: str, categories: dict[str, int]) -> Trial:
        from pytest_vram.drygpu import driver
        from pytest_vram.drygpu.values import host_reads

        device, context, managed, total = _driver_figures(self.torch)
        return Trial(
            fits=not message,
            message=message,
            phases=dict(self.phases),
            categories=categories,
            peak_allocated=max([*self.phases.values(), 0]),
            peak_reserved=max(self.torch.cuda.max_memory_reserved(), self.loading_peaks[0]),
            peak_device=max(device, self.loading_peaks[1]),
            context=context,
            total=total,
            managed=managed - self.managed_before,
            pinned=driver.stats(self.torch.cuda.current_device()).host_peak_bytes if driver.is_active() else 0,
            seconds=round(time.perf_counter() - self.begin, 2),
            device=self.torch.cuda.get_device_name(),
            dry=driver.is_active(),
            host_reads=host_reads.collect() if driver.is_active() else (),
            notes=assumptions.collect(),
            recording=None if self.recorder is None else self.recorder.read(),
            rank=launch.rank(),
        )

    def _forget_peaks(self) -> None:
        from pytest_vram.drygpu import driver
        from pytest_vram.drygpu.values import host_reads

        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()
        if driver.is_active():
            driver.reset_peaks()
            host_reads.reset()

    def _clean(self, model: Any, optimizer: Any) -> None:
        """Remove adapter and optimizer from the base, free their memory, and reset the peaks."""
        from finetune.model import host_inputs
        from pytest_vram.drygpu import driver

        if optimizer is not None:
            optimizer.state.clear()
            optimizer.param_groups.clear()  # the caller still holds the optimizer, which holds the adapter
        if model is not None and model is not self.base:
            self.base = model.unload()
        self.base.requires_grad_(False)
        for parameter in self.base.parameters():
            parameter.grad = None
        del model, optimizer
        gc.collect()
        host_inputs.release()
        self._forget_peaks()
        if driver.is_active():
            # bitsandbytes frees managed memory only when the process ends, so the next trial must not count what was
            # allocated up to now.
            self.managed_before = driver.stats(self.torch.cuda.current_device()).managed_bytes
        self.phases = {key: value for key, value in self.phases.items() if key == "loading"}
        self.begin = time.perf_counter()


class _Phase:
    """Measures the peak of a phase in allocated bytes. If a phase is repeated, ``phases`` keeps the larger peak."""

    def __init__(self, torch: Any, phases: dict[str, int], name: str, recorder: TrialRecorder | None) -> None:
        self.torch, self.phases, self.name, self.recorder = torch, phases, name, recorder
        self.begin, self.peak = 0.0, 0

    def __enter__(self) -> Self:
        self.begin = time.perf_counter()
        if self.torch.cuda.is_initialized():
            torch_private.reset_peak(self.torch.cuda.current_device())
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self.torch.cuda.max_memory_allocated() if self.torch.cuda.is_initialized() else 0
        self.phases[self.name] = max(self.phases.get(self.name, 0), self.peak)
        if self.recorder is not None:
            self.recorder.phase(self.name, time.perf_counter() - self.begin, self.peak)


def model_config(name: str) -> Any:
    """Return the configuration of a shape, a folder or a hub model. No weights are read.

    Raises:
        ModelError: there is no such model.
    """
    from finetune.config.settings import EMBEDDED_MODEL, ModelConfig
    from finetune.model.load import load_config
    from finetune.model.shapes import find_shape, load_shape

    if find_shape(name) is not None or name == EMBEDDED_MODEL:
        return load_shape(name)
    return load_config(ModelConfig(model=name))


def _driver_figures(torch: Any) -> tuple[int, int, int, int]:
    """Return the bytes of device peak, context, peak of managed memory, and total memory of the card.

    On a real card, all memory in use that the allocator does not hold counts as context. That includes the memory of
    other processes, which is not available to a run either.
    """
    from pytest_vram.drygpu import driver

    if driver.is_active():
        stats = driver.stats(torch.cuda.current_device())
        return stats.peak_bytes, stats.context_bytes, stats.managed_peak_bytes, stats.total_bytes
    free, total = torch.cuda.mem_get_info()
    context = max(0, total - free - torch.cuda.memory_reserved())
    return torch.cuda.max_memory_reserved() + context, context, 0, total
