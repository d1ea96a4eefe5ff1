"""Peak memory of the same QLoRA step through several recipes, on one dry card, in one run.

    python benchmarks/peak_memory.py [--models mistral-7b llama-3.1-8b] [--seq 512 2048 8192] [--gpu a100-80]
                                     [--fit rtx-4080] [--recipes ours ours-on-card]

``trainer`` is the recipe of artidoro/qlora: transformers' Trainer and peft's prepare_model_for_kbit_training; ``trl``
is SFTTrainer, ``trl-liger`` the same with liger-kernel; ``ours`` is finetune as it comes on a card that the step fills:
every layer recomputes, as in the other recipes, and the layers' inputs wait on the host. ``ours-on-card`` is the same
with ``--no-offload-activations``. (On a card with more room finetune spends that on speed; ``ours-auto`` shows it.)
Unsloth needs other versions of its neighbours, and an environment of its own: there run ``--recipes unsloth``.
``floor`` is what no recipe of this kind can do without if the inputs stay on the card (see recipes.py). Paged optimizer
state is in ``floor``, and not in the others' figures: it lives in managed memory.

What the peers lack: Trainer with prepare_model_for_kbit_training casts embeddings, head and norms to fp32, keeps the
logits of the whole micro-batch with their fp32 copy and gradient, and adapters and gradients in fp32. SFTTrainer (TRL
1.16) casts the adapters to bf16 and takes the loss in chunks, as we do; its paged optimizer leaves states of fewer than
100,000 elements on the card, half of those of rank 16 on a 7B model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune.model.shapes import load_shape
from pytest_vram.drygpu import empty_checkpoint, find_card

HERE = Path(__file__).parent
GIB = 2**30


def dry(recipe: str, checkpoint: Path, gpu: str, seq: int, room: int | None) -> dict[str, list[int]]:
    """What one recipe's run printed, by the first word of its lines: figures in bytes, and rows.

    Args:
        recipe: of recipes.py.
        checkpoint: the base.
        gpu: the dry card it runs on.
        seq: tokens of a row; one row a micro-batch.
        room: bytes of another card, for which the largest micro-batch is searched too.
    """
    command = ["-m", "pytest_vram", "run", "--gpu", gpu, "--", str(HERE / "recipes.py"), recipe, str(checkpoint)]
    command += ["--seq", str(seq)] + ([] if room is None else ["--most", str(room)])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [line.split() for line in done.stdout.splitlines()]
    return {
        words[0]: [int(w) for w in words[1:]] for words in lines if words and words[0] in ("peaks", "floor", "rows")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mistral-7b", "llama-3.1-8b"])
    parser.add_argument("--seq", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--gpu", default="a100-80")
    parser.add_argument("--fit", metavar="CARD", help="also search the most tokens a step on this card")
    parser.add_argument("--recipes", nargs="+", default=["trainer", "trl", "trl-liger", "ours", "ours-on-card"])
    arguments = parser.parse_args()
    room = None
    if arguments.fit:
        card = find_card(arguments.fit)
        room = card.total_bytes - card.context_bytes
    print(
        f"{'model':<14}{'seq':>6} "
        f" {'recipe':<14}{'allocated':>11}{'reserved':>11}{'/ floor':>9}{'/ first':>11}{'tokens that fit':>17}"
    )
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = empty_checkpoint(load_shape(name), folder, dtype="bfloat16")
            for seq in arguments.seq:
                floor = dry("floor", checkpoint, arguments.gpu, seq, None)["floor"][0]
                print(f"{name:<14}{seq:>6}  {'floor':<14}{floor / GIB:>7.2f} GiB{'':>11}{1:>9.2f}", flush=True)
                first = 0
                for recipe in arguments.recipes:
                    found = dry(recipe, checkpoint, arguments.gpu, seq, room)
                    allocated, reserved = found["peaks"]
                    first = first or allocated
                    tokens = f"{found['rows'][0] * seq:,}" if "rows" in found else ""
                    print(
                        f"{name:<14}{seq:>6}  {recipe:<14}{allocated / GIB:>7.2f} GiB{reserved / GIB:>7.2f} GiB"
                        f"{allocated / floor:>9.2f}{allocated / first:>11.2f}{tokens:>17}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
