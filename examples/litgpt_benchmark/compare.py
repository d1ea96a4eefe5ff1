"""Peaks of a dry A10G beside those that LitGPT publishes, measured on a real one.

    git clone https://github.com/Lightning-AI/litgpt
    python compare.py litgpt [WORD ...]

``config_hub/finetune/README.md`` of the checkout has a table of what torch allocated at most
(``torch.cuda.max_memory_allocated``). Its LoRA and QLoRA rows that ran on one A10G, or those whose name has one of the
words in it, are run with the checkout's own code, as they are configured there. Their micro-batches are 512 tokens
long, so nothing is chosen. Left out are full fine-tunes: most of their figures are smaller than weights, gradients
and states together, so they are not of one card.

A figure belongs to the versions it was measured with. Those of April 2024, and what came out: published.txt.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROW = re.compile(r"^\| (\S+)/(lora|qlora)\.yaml +\|.*\| 1xA10G +\|.*\| +([0-9.]+) GB +\|", re.MULTILINE)
RENAMED = {"gemma2b": "gemma2-2b"}
"""A row's model where it is not its folder's name."""


def dry(checkout, recipe):
    """The most that torch allocated, in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        run = [sys.executable, "-m", "pytest_vram", "run", "--gpu", "a10g", "--json", out.name, "--"]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [*run, str(HERE / "train.py"), str(recipe)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return json.loads(Path(out.name).read_text())["peak_allocated_bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=lambda name: Path(name).resolve(strict=True))
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args()
    hub = options.checkout / "config_hub" / "finetune"
    folders = {folder.name.casefold(): folder for folder in hub.iterdir()}
    print(f"{'configuration':<30} {'measured':>10} {'dry':>10} {'off by':>8}")
    for model, method, measured in ROW.findall((hub / "README.md").read_text()):
        name, folder = f"{model}/{method}", folders[RENAMED.get(model, model)]
        if not any(word in name for word in options.words or [""]):
            continue
        try:
            found = dry(options.checkout, folder / f"{method}.yaml") / 1e9
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode().strip().splitlines()
            text = next((line for line in lines if "Error: " in line), "failed")
        else:
            text = f"{found:>7.2f} GB {found / float(measured) - 1:>+8.2%}"
        print(f"{name:<30} {measured:>7} GB {text}", flush=True)


if __name__ == "__main__":
    main()
