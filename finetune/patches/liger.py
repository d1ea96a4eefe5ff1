"""The patch of liger-kernel, which puts its modules into one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_kernels(model: PreTrainedModel, **kernels: bool) -> bool:
    """Replace modules of a model by those of liger-kernel, in place.

    The function of liger-kernel that does this is private. The patch may go when liger-kernel patches one model through
    a public function; look again with 0.9.

    Args:
        model: a model of transformers, without adapter.
        kernels: which kernels to use, by liger-kernel's names, such as ``rms_norm=True``. All that it knows have to be
            named, because the others follow its own defaults.

    Returns:
        Whether liger-kernel knows the model's architecture. Nothing is changed if it does not.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model=model, **kernels)
    return True
