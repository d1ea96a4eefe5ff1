"""``python -m finetune.ladder``: measures and draws the memory of several ways to train one model."""
