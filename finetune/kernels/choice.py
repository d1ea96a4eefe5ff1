"""Chooses a model's fused kernels on a card: the adapter's and the loss's own, and those of liger-kernel.

liger-kernel (https://github.com/linkedin/Liger-Kernel) is an extra: ``pip install 'pytest-vram[cuda]'``. It runs norms,
rotations and gates. Its loss is not used, because :mod:`finetune.model.loss` needs less memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel

from finetune.errors import ConfigError, Problem
from finetune.kernels.available import can_launch, kernel_runs_on, liger_is_installed
from finetune.model.forward import base_model
from finetune.model.loss import KERNEL
from finetune.patches.liger import apply_kernels

if TYPE_CHECKING:
    import torch
    from torch import nn

_SET = "finetune_kernels"
_USED = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
_GATES = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
"""The activations that each gate of liger-kernel computes, whatever the model's own is."""
_NOT_USED = {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False}


def check_kernels(name: str, device: torch.device) -> None:
    """Refuse ``--kernels liger`` if liger-kernel cannot be used.

    Raises:
        ConfigError: liger-kernel is not installed, or there is no GPU, or its kernels cannot be compiled.
    """
    if name != "liger":
        return
    why = None
    if not liger_is_installed():
        why, remedy = "liger-kernel is not installed", "pip install liger-kernel, or use --kernels auto"
    elif device.type != "cuda":
        why, remedy = "liger-kernel needs a GPU", "use --kernels auto"
    elif not can_launch():
        why = "its kernels are compiled here, and there is no C compiler or no Python.h"
        remedy = "install gcc and Python's headers (python3-dev), or use --kernels auto"
    if why is not None:
        raise ConfigError(Problem(field="kernels", value=name, why=why, remedy=remedy))


def set_kernels(model: nn.Module, name: str) -> list[str]:
    """Make a model on a card run fused kernels, in place. A second call changes nothing.

    Args:
        model: the model, with its adapter attached.
        name: the value of ``--kernels``. On a CPU, and with ``torch``, no layer is changed.

    Returns:
        Sentences that say what runs fused and what does not; empty if nothing was changed.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or name == "torch" or getattr(model, _SET, False):
        return []
    setattr(model, _SET, True)
    said = []
    if not can_launch():
        said.append("there is no C compiler or no Python.h here, so that no kernels of Triton or liger-kernel run")
    if isinstance(model, PeftModel):
        from finetune.kernels.fused_adapter import fuse

        said.append(str(fuse(model)))
    base: Any = base_model(model)
    if kernel_runs_on(device):
        from finetune.kernels.cross_entropy import losses_and_gradient

        head = base.get_output_embeddings()
        if head is not None:
            setattr(head, KERNEL, losses_and_gradient)
    if kernel_runs_on(device) and liger_is_installed() and not getattr(base, _SET + "_liger", False):
        setattr(base, _SET + "_liger", True)
        said.append(_apply_liger(base))
    return said


def _apply_liger(base: Any) -> str:
    """Use liger-kernel's modules in a model of transformers, and return what was done, in a sentence."""
    kind = base.config.model_type
    used = dict(_USED)
    activation = _activation(base)
    for name, computes in _GATES.items():  # quantized experts are in a module of this package
        used[name] = activation in computes and not _is_mixture(base)
    if not apply_kernels(base, **used, **_NOT_USED):
        return f"liger-kernel has no kernels for {kind} models, so PyTorch's own run"
    what = "norms, rotations and gates" if used["swiglu"] or used["geglu"] else "norms and rotations"
    return f"liger-kernel runs {what} of this {kind} model"


def _activation(base: Any) -> str | None:
    """Return the name of the activation in the model's MLP; None if its config does not name one."""
    config = base.config.get_text_config()
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if isinstance(name, str) else None


def _is_mixture(base: Any) -> bool:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return any(getattr(base.config.get_text_config(), name, None) for name in names)
