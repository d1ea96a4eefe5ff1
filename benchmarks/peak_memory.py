"""Peak memory of the same QLoRA step through three recipes, on one dry card, in one run.

    python benchmarks/peak_memory.py [--models mistral-7b llama-3.1-8b] [--seq 512 2048 8192] [--gpu a100-80] [--fit
    rtx-4080]

``trainer`` is the recipe of artidoro/qlora: transformers' Trainer and peft's prepare_model_for_kbit_training; ``trl``
is SFTTrainer; ``ours`` is finetune. ``floor`` is what no recipe of this kind can do without (see recipes.py). Paged
optimizer state is in ``floor``, and not in the others' figures: it lives in managed memory.

What the peers lack: Trainer with prepare_model_for_kbit_training casts embeddings, head and norms to fp32, keeps the
logits of the whole micro-batch with their fp32 copy and gradient, and adapters and gradients in fp32. SFTTrainer (TRL
1.16) casts the adapters to bf16 and takes the loss in chunks, as we do; its paged optimizer leaves states of fewer than
100,000 elements on the card, half of those of rank 16 on a 7B model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune.shapes import load_shape
from pytest_vram.drygpu import empty_checkpoint

HERE = Path(__file__).parent
GIB = 2**30


def dry(recipe: str, checkpoint: Path, gpu: str, *, seq: int, micro_batch: int = 1) -> dict[str, float]:
    """Peaks in bytes; ``fits`` is 0 where the card was too small."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = ["-m", "pytest_vram", "run", "--gpu", gpu, "--json", str(out), "--", str(HERE / "recipes.py")]
        arguments = [recipe, str(checkpoint), "--seq", str(seq), "--micro-batch", str(micro_batch)]
        done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, check=False)
        figures = json.loads(out.read_text())
        if done.returncode and not figures["num_ooms"]:
            raise RuntimeError(done.stderr[-2000:])
        floor = [line for line in done.stdout.splitlines() if line.startswith("floor ")]
        return {
            "allocated": float(floor[0].split()[1]) if floor else figures["peak_allocated_bytes"],
            "reserved": figures["peak_reserved_bytes"],
            "fits": float(done.returncode == 0),
        }


def most_rows(recipe: str, checkpoint: Path, gpu: str, seq: int) -> int:
    """The largest micro-batch that fits the card."""
    low, high = 0, 1
    while high <= 512 and dry(recipe, checkpoint, gpu, seq=seq, micro_batch=high)["fits"]:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        fits = dry(recipe, checkpoint, gpu, seq=seq, micro_batch=middle)["fits"]
        low, high = (middle, high) if fits else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mistral-7b", "llama-3.1-8b"])
    parser.add_argument("--seq", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--gpu", default="a100-80")
    parser.add_argument("--fit", metavar="CARD", help="also search the most tokens a step on this card (takes long)")
    arguments = parser.parse_args()
    print(
        f"{'model':<14}{'seq':>6} "
        f" {'recipe':<8}{'allocated':>11}{'reserved':>11}{'/ floor':>9}{'/ trainer':>11}{'tokens that fit':>17}"
    )
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = empty_checkpoint(load_shape(name), folder, dtype="bfloat16")
            for seq in arguments.seq:
                found = {
                    recipe: dry(recipe, checkpoint, arguments.gpu, seq=seq)
                    for recipe in ("floor", "trainer", "trl", "ours")
                }
                for recipe, figures in found.items():
                    tokens = ""
                    if arguments.fit and recipe != "floor":
                        tokens = f"{most_rows(recipe, checkpoint, arguments.fit, seq) * seq:,}"
                    reserved = "" if recipe == "floor" else f"{figures['reserved'] / GIB:.2f} GiB"
                    print(
                        f"{name:<14}{seq:>6}  {recipe:<8}{figures['allocated'] / GIB:>7.2f} GiB{reserved:>11}"
                        f"{figures['allocated'] / found['floor']['allocated']:>9.2f}"
                        f"{figures['allocated'] / found['trainer']['allocated']:>11.2f}{tokens:>17}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
