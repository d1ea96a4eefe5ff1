"""Peaks of dry A100s beside those that fms-acceleration publishes of real ones, FSDP on two cards among them.

    python compare.py [WORD ...]
    python compare.py --published CHECKOUT/scripts/benchmarks/refs/a100_80gb.csv [WORD ...]

The benchmark (github.com/foundation-model-stack/fms-acceleration) records the most that torch allocated on an
A100-80 while the Trainer trained (``mem_peak_torch_mem_alloc_in_bytes``; February 2025). The table below has its rows
without kernels of its own; ``--published`` reads them from the file. Rows that ended out of memory there are run too.

Versions, what was chosen and what came out: published.txt.
"""

import argparse
import csv
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from pytest_vram.drygpu import empty_checkpoint

HERE = Path(__file__).parent
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **MISTRAL,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "sliding_window": None,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MODELS = {
    "mistralai/Mistral-7B-v0.1": ("mistral-7b", MISTRAL),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mixtral-8x7b", MIXTRAL),
    "NousResearch/Llama-2-70b-hf": ("llama-2-70b", LLAMA),
}
METHODS = {"baseline-peft-bnb": "qlora-kbit", "accelerated-peft-bnb": "qlora"}
MEASURED = {  # model, method, cards, rows of a card: bytes; 0: out of memory
    ("mistral-7b", "full", 1, 4): 72_434_837_504,
    ("mistral-7b", "full", 2, 2): 36_225_939_968,
    ("mistral-7b", "full", 1, 8): 72_435_230_720,
    ("mistral-7b", "full", 2, 4): 36_226_136_576,
    ("mistral-7b", "lora", 1, 4): 26_704_571_904,
    ("mistral-7b", "lora", 2, 2): 15_144_870_400,
    ("mistral-7b", "lora", 1, 8): 38_742_912_512,
    ("mistral-7b", "lora", 2, 4): 21_959_827_968,
    ("mixtral-8x7b", "lora", 2, 2): 57_554_708_992,
    ("mixtral-8x7b", "lora", 2, 4): 64_851_605_504,
    ("mistral-7b", "qlora-kbit", 1, 4): 20_669_338_112,
    ("mistral-7b", "qlora-kbit", 2, 2): 9_424_594_432,
    ("mistral-7b", "qlora-kbit", 1, 8): 37_002_646_016,
    ("mistral-7b", "qlora-kbit", 2, 4): 15_970_067_968,
    ("mixtral-8x7b", "qlora-kbit", 1, 4): 42_794_268_160,
    ("mixtral-8x7b", "qlora-kbit", 2, 2): 21_129_981_952,
    ("mixtral-8x7b", "qlora-kbit", 1, 8): 60_545_920_512,
    ("mixtral-8x7b", "qlora-kbit", 2, 4): 28_146_350_592,
    ("llama-2-70b", "qlora-kbit", 2, 2): 46_685_287_936,
    ("mistral-7b", "qlora", 1, 4): 16_373_838_336,
    ("mistral-7b", "qlora", 2, 2): 9_424_594_432,
    ("mistral-7b", "qlora", 1, 8): 28_412_178_944,
    ("mistral-7b", "qlora", 2, 4): 15_970_067_968,
    ("mixtral-8x7b", "qlora", 1, 4): 36_731_843_072,
    ("mixtral-8x7b", "qlora", 2, 2): 21_126_185_472,
    ("mixtral-8x7b", "qlora", 1, 8): 48_770_183_680,
    ("mixtral-8x7b", "qlora", 2, 4): 28_154_534_912,
    ("llama-2-70b", "qlora", 1, 4): 68_126_381_056,
    ("llama-2-70b", "qlora", 2, 2): 46_685_287_936,
}


def published(file):
    """The rows of the benchmark's file that use none of its own kernels, in the form of MEASURED."""
    found = {}
    for row in csv.DictReader(file.open()):
        framework = row["framework_config"]
        if row["model_name_or_path"] not in MODELS or framework not in ("none", *METHODS):
            continue
        method = METHODS.get(framework) or row["peft_method"] or "full"
        name = MODELS[row["model_name_or_path"]][0]
        key = name, method, int(row["num_gpus"]), int(row["per_device_train_batch_size"])
        found[key] = int(row["mem_peak_torch_mem_alloc_in_bytes"] or 0)
    return found


def free_port():
    """A port that no process listens on, so that rows may run at the same time."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        return listening.getsockname()[1]


def dry(model, method, cards, rows):
    """What the benchmark would have recorded on dry cards, in bytes."""
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(HERE / "fsdp.yaml"),
        "--num_processes",
        str(cards),
        "--main_process_port",
        str(free_port()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "peak.json")
        command = [sys.executable, "-m", "pytest_vram", "run", "--gpu", "a100-80", "--count", str(cards), "--"]
        command += launch if cards > 1 else []
        command += [str(HERE / "train.py"), str(model), method, str(rows), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if out.exists():
            return json.loads(out.read_text())["peak"]
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in lines if "Error: " in line), "failed"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only rows whose name has one of them")
    parser.add_argument("--published", type=Path, metavar="CSV", help="the benchmark's own file")
    options = parser.parse_args()
    measured_rows = published(options.published) if options.published else MEASURED
    print(f"{'model, method, cards x rows':<32} {'measured':>15} {'dry':>15} {'off by':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for (name, method, cards, rows), measured in measured_rows.items():
            title = f"{name} {method} {cards}x{rows}"
            if not any(word in title for word in options.words or [""]):
                continue
            model = Path(folder, name)
            if not model.exists():
                empty_checkpoint(
                    next(fields for called, fields in MODELS.values() if called == name), model, dtype="bfloat16"
                )
            try:
                found = dry(model, method, cards, rows)
                text = f"{found:>15,} {found / measured - 1:>+8.2%}" if measured else f"{found:>15,}"
            except RuntimeError as error:
                text = str(error)
            print(f"{title:<32} {measured:>15,} {text}", flush=True)


if __name__ == "__main__":
    main()
