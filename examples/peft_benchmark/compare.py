"""Peaks of a dry L40S beside those that Hugging Face measured on a real one.

PEFT publishes, for each method of its comparison, the most memory that torch reserved on an NVIDIA L40S
(github.com/huggingface/peft, method_comparison/MetaMathQA/results, ``accelerator_memory_max``; July 2026, torch
2.13). What it does not publish is how long the longest batch was. One round number, 700 tokens, was chosen so that
``lora-r32`` comes out right; all other rows are predictions with that same number.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_vram.drygpu import empty_checkpoint

HERE = Path(__file__).parent
LLAMA_3_2_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MEASURED = {
    "lora-r32": 22_292_725_760,
    "lora-r64": 22_552_772_608,
    "lora-r10-mlp": 24_698_159_104,
    "dora-r32": 24_532_484_096,
    "c3a": 22_059_941_888,
    "fourierft": 23_657_971_712,
    "ia3": 23_234_347_008,
    "ia3-all": 26_145_193_984,
    "ln-tuning": 21_181_235_200,
    "loha-r32": 23_907_532_800,
    "lokr-r32": 23_590_862_848,
    "oft-r32": 22_332_571_648,
    "vera-r256": 21_621_637_120,
}


def dry_peak(model, method):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = ["run", "--gpu", "l40s", "--json", out.name, "--", str(HERE / "train.py")]
        arguments = ["--model", str(model), "--method", method]
        subprocess.run([sys.executable, "-m", "pytest_vram", *command, *arguments], check=True, stderr=subprocess.PIPE)
        return json.loads(Path(out.name).read_text())["peak_reserved_bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=list(MEASURED))
    methods = parser.parse_args().methods
    with tempfile.TemporaryDirectory() as folder:
        model = empty_checkpoint(LLAMA_3_2_3B, folder, dtype="bfloat16")
        print(f"{'method':<14} {'measured':>15} {'dry':>15} {'off by':>8}")
        for method in methods:
            measured, dry = MEASURED[method], dry_peak(model, method)
            print(f"{method:<14} {measured:>15,} {dry:>15,} {dry / measured - 1:>+8.2%}", flush=True)


if __name__ == "__main__":
    main()
