"""Peak memory of the same QLoRA step through several recipes, on one dry card, in one run.

    python benchmarks/peak_memory.py [--models mistral-7b llama-3.1-8b] [--seq 512 2048 8192] [--gpu a100-80]
                                     [--fit rtx-4080] [--recipes ours ours-on-card] [--json figures.json]

The whole of it takes hours on two cores. With ``--json`` each figure is saved when it is there, and a second run takes
from the file what was measured on the same card with the same ``--fit``; so the work may be stopped, continued, and
shared between runs that name other models, rows or recipes.

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
import fcntl
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.model.shapes import load_shape
from pytest_vram.drygpu import empty_checkpoint, find_card

if TYPE_CHECKING:
    from collections.abc import Iterator

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


class Figures:
    """What was measured so far, in a file that several runs may share; without a file, in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, list[int]]] = {}

    def get(self, key: str) -> dict[str, list[int]] | None:
        if self._path is not None and self._path.exists():
            self._known = json.loads(self._path.read_text())
        return self._known.get(key)

    def put(self, key: str, found: dict[str, list[int]]) -> None:
        if self._path is None:
            self._known[key] = found
            return
        with self._path.with_suffix(".lock").open("w") as lock:  # another run may add a figure of its own
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.get(key)
            self._known[key] = found
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(self._known, indent=1, sort_keys=True) + "\n")
            fresh.replace(self._path)


def measured(arguments: argparse.Namespace, figures: Figures) -> Iterator[tuple[str, int, str, dict[str, list[int]]]]:
    """Yield model, tokens of a row, recipe, and what was found; the floor of a row first."""
    room = None
    if arguments.fit:
        card = find_card(arguments.fit)
        room = card.total_bytes - card.context_bytes
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint: Path | None = None
            for seq in arguments.seq:
                for recipe in ("floor", *arguments.recipes):
                    searched = room if recipe != "floor" else None
                    key = " ".join([name, str(seq), recipe, arguments.gpu, str(arguments.fit if searched else None)])
                    found = figures.get(key)
                    if found is None:
                        checkpoint = checkpoint or empty_checkpoint(load_shape(name), folder, dtype="bfloat16")
                        found = dry(recipe, checkpoint, arguments.gpu, seq, searched)
                        figures.put(key, found)
                    yield name, seq, recipe, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mistral-7b", "llama-3.1-8b"])
    parser.add_argument("--seq", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--gpu", default="a100-80")
    parser.add_argument("--fit", metavar="CARD", help="also search the most tokens a step on this card")
    recipes = ["trainer", "trl", "trl-liger", "ours", "ours-on-card"]
    parser.add_argument("--recipes", nargs="+", default=recipes, choices=[*recipes, "unsloth"])
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures there, and do not measure them twice"
    )
    arguments = parser.parse_args()
    print(
        f"{'model':<14}{'seq':>6} "
        f" {'recipe':<14}{'allocated':>11}{'reserved':>11}{'/ floor':>9}{'/ first':>11}{'tokens that fit':>17}"
    )
    floor = first = 0
    for name, seq, recipe, found in measured(arguments, Figures(arguments.json)):
        if recipe == "floor":
            floor, first = found["floor"][0], 0
            print(f"{name:<14}{seq:>6}  {'floor':<14}{floor / GIB:>7.2f} GiB{'':>11}{1:>9.2f}", flush=True)
            continue
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
