"""One LoRA or QLoRA configuration of LitGPT's hub, as LitGPT runs it: three steps and an evaluation.

    python train.py config_hub/finetune/mistral-7b/lora.yaml

What differs from a user's run needs no memory on the card: the weights are LitGPT's initial ones (a checkpoint is
copied into them), all rows are cut at the configuration's 512 tokens, and nothing is merged at the end.
"""

import dataclasses
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

import yaml
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.finetune import lora
from litgpt.utils import save_config
from tokenizers import Tokenizer, models, pre_tokenizers

STEPS = 3
"""The optimizer's states are there from the second step on."""


def known(kind, values, **changes):
    """The dataclass with those of the values that this version of LitGPT has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in {**values, **changes}.items() if name in names})


def checkpoint(name, folder):
    """A checkpoint's folder but for the weights: the shape, and a tokenizer that knows one word."""
    save_config(Config.from_name(name), folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Any", "eos_token": "</s>"}))
    (folder / "lit_model.pth").touch()
    return folder


def main():
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    for name in ("load_checkpoint", "save_hyperparameters", "merge_lora"):  # of a checkpoint, of a command line
        setattr(lora, name, lambda *_, **__: None)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [{"instruction": "word " * 300, "input": "", "output": "word " * 300}] * 100
        Path("rows.json").write_text(json.dumps(rows))
        Path("checkpoint").mkdir()
        settings = config.keys() & inspect.signature(lora.setup).parameters.keys()
        lora.setup(
            **{name: config[name] for name in settings}
            | {
                "checkpoint_dir": checkpoint(Path(config["checkpoint_dir"]).name, Path("checkpoint")),
                "out_dir": Path("out"),
                "devices": 1,
                "data": JSON(Path("rows.json"), val_split_fraction=0.1, num_workers=0),
                "train": known(TrainArgs, config["train"], max_steps=STEPS),
                "eval": known(EvalArgs, config["eval"], interval=2, max_iters=2, max_new_tokens=4),
            }
        )


if __name__ == "__main__":
    main()
