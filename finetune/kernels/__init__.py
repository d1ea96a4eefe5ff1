"""Fused kernels of a training step, and the choice between them and the layers of PyTorch and peft."""
