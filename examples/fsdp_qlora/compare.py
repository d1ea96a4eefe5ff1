"""Peaks of two dry cards beside those that Answer.AI publishes of two real ones, for its script that trains 70B models.

    python compare.py CHECKOUT [--layers N] [WORD ...]

The benchmark (benchmarks_03_2024.md of github.com/AnswerDotAI/fsdp_qlora) gives the most that torch reserved on each of
two RTX 3090s or 4090s, in GiB. ``CHECKOUT`` is a checkout of that repository, at the commit that published the
benchmark: a later train.py steps the optimizer one tensor at a time, which needs less memory. It runs unchanged, on
rows of its own data set ``dummy``, with the flags of the published command. With WORDs only rows are run whose name has
one. ``--layers`` gives the models fewer layers; what comes out is then no counterpart of the published figure.

Versions, what was chosen and what came out: published.txt.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_vram.shapes import SHAPES

COMMIT = "4cd6923"
"""The commit of fsdp_qlora that published the benchmark."""
LATER = "fused_adamw"
"""What only a later train.py has. It gives AdamW ``fused=False``, and torch then uses no lists of tensors either."""
STEPS = 2
"""Steps of a run; a published one has hundreds. The second one has every state of the optimizer."""
YI_34B = {
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e6,
    "tie_word_embeddings": False,
}
MODELS = {
    "7b": ("meta-llama/Llama-2-7b-hf", SHAPES["llama-2-7b"].fields()),
    "34b": ("01-ai/Yi-34B", YI_34B),
    "70b": ("meta-llama/Llama-2-70b-hf", SHAPES["llama-2-70b"].fields()),
}
MEASURED = {  # model, method, where the weights are, rows of a card, tokens of a row: GiB reserved
    ("7b", "qlora", "sharded", 1, 512): 4.98,
    ("7b", "qlora", "sharded", 1, 2048): 5.21,
    ("7b", "lora", "sharded", 1, 512): 10.24,
    ("7b", "lora", "sharded", 1, 2048): 10.22,
    ("7b", "qlora", "sharded", 4, 2048): 11.22,
    ("7b", "qlora", "sharded", 10, 2048): 20.97,
    ("7b", "lora", "sharded", 4, 2048): 16.14,
    ("7b", "lora", "sharded", 6, 2048): 21.35,
    ("7b", "qlora", "whole", 8, 2048): 20.94,
    ("7b", "lora", "whole", 4, 2048): 22.04,
    ("7b", "lora", "host", 10, 2048): 22.69,
    ("7b", "qlora", "host", 12, 2048): 22.38,
    ("34b", "qlora", "sharded", 2, 2048): 23.05,
    ("34b", "qlora", "host", 4, 2048): 22.98,
    ("70b", "qlora", "host", 2, 2048): 14.92,
}
ALLOCATED = {  # the same rows: GiB allocated, which is published of these two
    ("7b", "lora", "sharded", 1, 512): 8.28,
    ("7b", "lora", "sharded", 1, 2048): 9.16,
}
PEAK = re.compile(r"Rank 0: Peak (allocated|reserved) memory: +([\d.]+) GiB")


def dry(checkout, row, layers, folder):
    """What train.py prints of rank 0 on dry cards, in GiB: the most allocated, and the most reserved."""
    model, method, where, rows, tokens = row
    name, fields = MODELS[model]
    shape = Path(folder, f"{model}.json")
    fields = {key: value for key, value in fields.items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    shape.write_text(json.dumps(fields | ({"num_hidden_layers": layers} if layers else {})))
    command = [sys.executable, "-m", "pytest_vram", "run", "--gpu", "rtx-3090", "--count", "2"]
    command += ["--shape", f"{name}={shape}", "--", "train.py", "--model_name", name]
    command += ["--batch_size", rows, "--context_length", tokens, "--train_type", method]
    command += ["--use_gradient_checkpointing", True, "--reentrant_checkpointing", True]
    command += ["--use_cpu_offload", where == "host", "--log_to", "stdout", "--dataset", "dummy"]
    command += ["--dataset_samples", 2 * STEPS * rows, "--loading_workers", 0]  # each pool of workers starts processes
    command += ["--sharding_strategy", "ddp"] if where == "whole" else []
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=checkout, check=False)
    found = {what: float(size) for what, size in PEAK.findall(done.stdout)}
    if not found:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in lines if "Error: " in line), "failed"))
    return found["allocated"], found["reserved"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of each model (default: its own)")
    options = parser.parse_intermixed_args()
    program = options.checkout / "train.py"
    if not program.is_file():
        parser.error(f"{options.checkout} has no train.py: it must be a checkout of github.com/AnswerDotAI/fsdp_qlora")
    if LATER in program.read_text():
        parser.error(f"{program} is later than the benchmark: git -C {options.checkout} checkout {COMMIT}")
    columns = f"{'measured':>8} {'dry':>6} {'off by':>7}   dry, allocated (measured)"
    print(f"{'model, method, weights, rows x tokens':<38} {columns}")
    with tempfile.TemporaryDirectory() as folder:
        for row, measured in MEASURED.items():
            model, method, where, rows, tokens = row
            title = f"{model} {method} {where} {rows}x{tokens}"
            if any(word in title for word in options.words or [""]):
                try:
                    allocated, reserved = dry(options.checkout, row, options.layers, folder)
                    text = f"{reserved:>6.2f} {reserved / measured - 1:>+7.1%}   {allocated:.2f}"
                    text += f" ({ALLOCATED[row]:.2f})" if row in ALLOCATED else ""
                except RuntimeError as error:
                    text = str(error)
                print(f"{title:<38} {measured:>8.2f} {text}", flush=True)


if __name__ == "__main__":
    main()
