"""Peaks of a dry L40S beside those that Hugging Face measured on a real one.

    python compare.py [METHOD ...]
    python compare.py --published peft/method_comparison/MetaMathQA
    python compare.py --published peft/method_comparison/image-gen

PEFT publishes, for each method of its comparison, the most memory that torch reserved on an NVIDIA L40S
(github.com/huggingface/peft, method_comparison/MetaMathQA/results, ``accelerator_memory_max``; July 2026, torch
2.13), and the tokens of all rows, 209 each on average. What it does not publish is how they are spread. Two numbers
were chosen so that ``lora-r32`` comes out right, a spread of 0.38 (of the logarithm) and 695 tokens in the longest
batch; all other rows are predictions with the same numbers. With ``--published``, every experiment of a checkout of
PEFT is run as it is configured there; those of ``image-gen`` have fixed sizes and need no chosen number.

``adalora-r64`` is off with PEFT 0.20 and later, which needs more memory than the version that was measured: see
adalora-trains-its-rank.md.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_vram.drygpu import empty_checkpoint

HERE = Path(__file__).parent
WIDTH = 30
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
    "full": 38_868_615_168,
    "lora-r32": 22_292_725_760,
    "lora-r64": 22_552_772_608,
    "lora-r10-mlp": 24_698_159_104,
    "dora-r32": 24_532_484_096,
    "adalora-r64": 22_781_362_176,
    "c3a": 22_059_941_888,
    "fourierft": 23_657_971_712,
    "hira-r32": 23_597_154_304,
    "ia3": 23_234_347_008,
    "ia3-all": 26_145_193_984,
    "ln-tuning": 21_181_235_200,
    "loha-r32": 23_907_532_800,
    "lokr-r32": 23_590_862_848,
    "oft-r32": 22_332_571_648,
    "vera-r256": 21_621_637_120,
}


def dry(script, *arguments):
    """What the script prints, if anything, and the run's figures."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = ["run", "--gpu", "l40s", "--json", out.name, "--", str(HERE / script), *map(str, arguments)]
        done = subprocess.run([sys.executable, "-m", "pytest_vram", *command], check=True, capture_output=True)
        return done.stdout.decode(), json.loads(Path(out.name).read_text())


def text_rows(options, model):
    """Name, bytes measured, and a function that gives the dry ones: the most that was reserved."""

    def peak(*arguments):
        return dry("train.py", "--model", model, *arguments)[1]["peak_reserved_bytes"]

    if options.published is None:
        for method in options.methods:
            yield method, MEASURED[method], functools.partial(peak, "--method", method)
        return
    for name, experiment, result in published(options.published):
        yield name, result["accelerator_memory_max"], functools.partial(peak, "--experiment", experiment)


def image_rows(folder):
    """The same for images: what was reserved after a step, on average until the first evaluation."""

    def reserved(experiment):
        said = dry("train_image.py", "--experiment", experiment)[0]
        return json.loads(next(line for line in said.splitlines() if line.startswith("{")))["reserved"]

    for name, experiment, result in published(folder):
        yield name, round(result["metrics"][0]["mem reserved avg"]), functools.partial(reserved, experiment)


def published(folder):
    """Name, folder and result of every experiment that has one."""
    for experiment in sorted(folder.glob("experiments/*/*/")):
        result = folder / "results" / f"{experiment.parent.name}--{experiment.name}.json"
        if result.exists():
            setting = experiment.name.removeprefix("llama-3.2-3B-").removeprefix("flux2-klein-")
            yield f"{experiment.parent.name} {setting}", experiment, json.loads(result.read_text())["train_info"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=list(MEASURED))
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="MetaMathQA or image-gen, of a checkout")
    options = parser.parse_args()
    images = options.published is not None and options.published.resolve().name == "image-gen"
    with tempfile.TemporaryDirectory() as folder:
        model = None if images else empty_checkpoint(LLAMA_3_2_3B, folder, dtype="bfloat16")
        print(f"{'method':<{WIDTH}} {'measured':>15} {'dry':>15} {'off by':>8}")
        for name, measured, take in image_rows(options.published) if images else text_rows(options, model):
            try:
                found = take()
            except subprocess.CalledProcessError as error:
                said = error.stderr.decode().strip().splitlines()
                text = next((line for line in said if "Error: " in line), "failed")
            else:
                text = f"{found:>15,} {found / measured - 1:>+8.2%}"
            print(f"{name[:WIDTH]:<{WIDTH}} {measured:>15,} {text}", flush=True)


if __name__ == "__main__":
    main()
