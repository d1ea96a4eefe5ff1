"""``python -m finetune.ladder``: the memory of each way to train one model, measured and drawn."""
