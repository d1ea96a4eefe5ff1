"""Seconds, memory and counts of one recipe's step, in a process of its own; see gpu_speed.py, which starts it.

Every recipe is started as recipes.py has it, with random weights, so that losses and gradients are numbers that can be
looked at. A step is timed from one optimizer step to the next, and the card is waited for at each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

PRODUCTS = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitK", re.IGNORECASE)
"""Names of kernels that multiply matrices, attention left out."""
WARM_UP = 2  # the first finds caches and compiles, the second is the first with optimizer state


class Clock:
    """Hears of each optimizer step: waits for the card, and notes the time and what was counted."""

    def __init__(self, steps: int, profile: Path | None) -> None:
        self.times: list[float] = []
        self.work: list[Any] = []
        self.steps, self.profile, self.profiler, self.kernels = steps, profile, None, {}

    def listen(self) -> None:
        """Every recipe's optimizer is one of bitsandbytes, or made of one."""
        from bitsandbytes.optim.optimizer import Optimizer8bit

        inner = Optimizer8bit.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = inner(optimizer, *args, **kwargs)
            self.tick()
            return result

        Optimizer8bit.step = step

    def tick(self) -> None:
        import torch

        from pytest_vram.drygpu import driver

        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if driver.is_active():
            self.work.append(driver.work())
            return
        if len(self.times) == self.steps - 1:  # the last step is profiled, and not timed
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        elif self.profiler is not None and len(self.times) == self.steps:
            self.profiler.__exit__(None, None, None)
            averages = self.profiler.key_averages()
            self.kernels = {
                event.key: event.self_device_time_total / 1e6
                for event in averages
                if event.device_type == torch.autograd.DeviceType.CUDA
            }
            if self.profile is not None:
                self.profile.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=60))
            self.times.pop()

    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)][WARM_UP - 1 :]


@contextlib.contextmanager
def weights_made_on_card() -> Iterator[None]:
    """Let transformers make the zeros of an empty checkpoint on the device, in place of 16 GB that it reads and copies.

    They are replaced by random weights afterwards. A transformers whose loader has another form reads them as ever.
    """
    import torch
    from transformers import core_model_loading

    own = getattr(core_model_loading, "_materialize_copy", None)
    if own is None:
        yield
        return

    def made(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        if device is None or not hasattr(tensor, "get_shape"):
            return own(tensor, device, dtype)
        return torch.zeros(tensor.get_shape(), dtype=dtype or torch.bfloat16, device=device)

    with mock.patch.object(core_model_loading, "_materialize_copy", made):
        yield


def randomized(model: Any) -> Any:
    """Weights that are no zeros: 4-bit codes at random with scales of their size, norms of 1, the rest normal."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                parameter.data.random_(0, 256)
                if state.state2 is None:
                    state.absmax.fill_(0.05)
                else:
                    state.absmax.random_(100, 256)
                    state.state2.absmax.fill_(0.02)
                    state.offset.fill_(0.03)
            elif "norm" in name:
                parameter.data.fill_(1.0)
            elif "lora_" not in name:
                parameter.data.normal_(0.0, 0.02)
    return model


def flops_of_a_token(model: Any, seq: int) -> float:
    """Floating-point operations that a token of a frozen base's training step cannot do without.

    Two for each weight of a matrix forward, two for the gradient with respect to its input, and for causal attention
    twice seq / 2 keys for scores and values, three times over. What is recomputed does not count, nor the adapter.
    """
    config = model.config
    heads = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    weights = config.vocab_size * config.hidden_size
    for module in model.modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module.weight, "quant_state"):
            weights += module.in_features * module.out_features
    return 4.0 * weights + 3 * 2 * 2 * config.num_hidden_layers * heads * seq / 2


def ceiling() -> float:
    """Floating-point operations a second of the card's bf16 matrix products, measured here."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin, count = time.perf_counter(), 20
    for _ in range(count):
        a @ b
    torch.cuda.synchronize()
    return 2.0 * size**3 * count / (time.perf_counter() - begin)


def measured(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    begin = time.perf_counter()
    if arguments.recipe == "unsloth":
        import unsloth  # noqa: F401 - has to be the first import of all
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    import recipes

    from finetune.model.shapes import load_shape
    from pytest_vram.drygpu import driver, empty_checkpoint

    dry = driver.is_active()
    most = None if dry else ceiling()
    torch.cuda.empty_cache()
    clock = Clock(arguments.steps, arguments.profile)
    clock.listen()
    checkpoint = str(empty_checkpoint(load_shape(arguments.shape), folder, dtype="bfloat16"))
    load, run = recipes.RECIPES[arguments.recipe]
    with weights_made_on_card():
        base = load(checkpoint)
    loaded = time.perf_counter() - begin
    base = randomized(base)
    flops = flops_of_a_token(base, arguments.seq)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    logged = run(base, arguments)
    seconds = clock.seconds()
    found: dict[str, Any] = {
        "recipe": arguments.recipe,
        "shape": arguments.shape,
        "seq": arguments.seq,
        "micro_batch": arguments.micro_batch,
        "accumulation": arguments.accumulation,
        "device": torch.cuda.get_device_name(),
        "dry": dry,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "losses": [round(loss, 5) for loss, _ in logged],
        "gradient_norms": [round(norm, 6) for _, norm in logged],
        "loaded_after_seconds": round(loaded, 1),
        "total_seconds": round(time.perf_counter() - begin, 1),
    }
    if dry:
        last = clock.work[-1] - clock.work[-2]
        found["work"] = {name: getattr(last, name) for name in type(last).__dataclass_fields__}
        return found
    tokens = arguments.seq * arguments.micro_batch * arguments.accumulation
    median = statistics.median(seconds)
    kernels = sum(clock.kernels.values())
    found |= {
        "seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": round(tokens / median, 1),
        "ceiling_flops": most,
        "flops_utilisation": round(flops * tokens / median / (most or 1.0), 4),
        "kernel_seconds": round(kernels, 4),
        # Some containers do not let a program profile the card. Then no kernel is known, and the rest is.
        "matrix_products_share": round(
            sum(s for name, s in clock.kernels.items() if PRODUCTS.search(name)) / kernels, 4
        )
        if kernels
        else None,
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("shape")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        # Otherwise Unsloth writes the code that it makes into the folder from which this is run.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(folder) / "unsloth_compiled_cache"))
        arguments.out.write_text(json.dumps(measured(arguments, folder)))


if __name__ == "__main__":
    main()
