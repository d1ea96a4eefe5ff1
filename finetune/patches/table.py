"""The table of all patches: what each changes, why it is needed, and when it may go.

A patch assigns to an attribute of another library's object, replaces one of its classes or functions, or calls a name
that the library calls private. ``tests/unit/finetune/patches/test_table.py`` reads this table. It fails when a patched
name is gone, and when a library reaches the version with which its patches have to be looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One patch of another library."""

    library: Literal["bitsandbytes", "liger-kernel", "peft", "transformers"]
    """The library's distribution on PyPI."""
    where: str
    """Full name of the function or class here that makes the patch."""
    what: str
    """Full name of the attribute that it changes or uses. Attributes that exist on instances only are given as
    ``module.Class:attribute``; they are looked for in the source of the class."""
    why: str
    """What goes wrong without the patch."""
    may_go_when: str
    """The change of the library that makes the patch unnecessary."""
    look_again_at: str
    """The first version with which nobody has yet tried whether the patch may go."""
    since: str = "0"
    """The first version that has what is patched, where the oldest supported version has it not yet."""


_BITSANDBYTES, _LIGER, _PEFT, _TRANSFORMERS = "0.52", "0.9", "0.23", "5.26"

PATCHES = (
    Patch(
        library="bitsandbytes",
        where="finetune.patches.bitsandbytes.keep_no_inputs",
        what="bitsandbytes.nn.Linear8bitLt",
        why="its product keeps every layer's input until backward, past the hooks of checkpointing",
        may_go_when="MatMul8bitLt saves its input with save_for_backward, or not at all for a frozen weight",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.patches.bitsandbytes.keep_weights_unpacked",
        what="bitsandbytes.nn.Linear4bit:support_avx512bf16_for_cpu",
        why="evaluation mode repacks weights on CPUs with AVX512_BF16 and rounds their scales to bf16 for good",
        may_go_when="packing and unpacking a layer gives its scales back bit for bit",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.patches.bitsandbytes.rows_by_themselves",
        what="bitsandbytes.MatmulLtState:threshold",
        why="one large value in any row makes LLM.int8() multiply a column of all rows in 16 bits",
        may_go_when="bitsandbytes offers a setting that changes the threshold of a layer after it was made",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.patches.bitsandbytes.gather_scales",
        what="bitsandbytes.nn.Linear4bit:quant_state",
        why="it keeps the scales of a weight beside it, where FSDP does not shard them",
        may_go_when="Linear4bit registers its scales as parameters or buffers that FSDP shards",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.patches.bitsandbytes.silence_casts",
        what="bitsandbytes.autograd._functions.logger",
        why="it warns at every layer of every step that LLM.int8() computes in fp16",
        may_go_when="the warning is given once, or not at all",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.training.masters.keep_masters",
        what="bitsandbytes.optim.optimizer.Optimizer2State.update_step",
        why="its optimizers update a bf16 weight in bf16, which rounds most updates away",
        may_go_when="its optimizers keep fp32 masters of bf16 weights",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.training.masters.keep_masters",
        what="bitsandbytes.optim.optimizer.Optimizer2State.init_state",
        why="the bits that a bf16 master drops are one more state of the parameter",
        may_go_when="its optimizers keep fp32 masters of bf16 weights",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="bitsandbytes",
        where="finetune.training.optim.make_optimizer",
        what="bitsandbytes.optim.optimizer.Optimizer8bit.get_state_buffer",
        why="it makes no paged buffer of int16, and puts a loaded state into ordinary memory (bitsandbytes#782)",
        may_go_when="bitsandbytes#782 is closed, and get_state_buffer takes any dtype",
        look_again_at=_BITSANDBYTES,
    ),
    Patch(
        library="liger-kernel",
        where="finetune.patches.liger.apply_kernels",
        what="liger_kernel.transformers.monkey_patch._apply_liger_kernel_to_instance",
        why="its public functions patch every model of an architecture, and need that architecture's name",
        may_go_when="liger-kernel patches one model through a public function",
        look_again_at=_LIGER,
    ),
    Patch(
        library="peft",
        where="finetune.kernels.fused_adapter.fuse",
        what="peft.tuners.lora.Linear.forward",
        why="it adds the adapter in operators of their own, each of which reads and writes all activations",
        may_go_when="peft computes the adapter together with its base layer",
        look_again_at=_PEFT,
    ),
    Patch(
        library="peft",
        where="finetune.patches.peft.as_named",
        what="peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
        why="it takes dense layers of some thirty mixtures for experts, by their names, and adapts other weights",
        may_go_when="it looks at the model before it rewrites a name",
        look_again_at=_PEFT,
        since="0.19",
    ),
    Patch(
        library="peft",
        where="finetune.patches.peft.as_named",
        what="peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
        why="it renames the matrices of a saved adapter for the same reason",
        may_go_when="it looks at the model before it rewrites a name",
        look_again_at=_PEFT,
        since="0.19",
    ),
    Patch(
        library="peft",
        where="finetune.patches.peft.make_precise",
        what="peft.tuners.lora.dora.DoraLinearLayer",
        why="its magnitudes have the adapter's dtype, and in bf16 no update of them survives the rounding",
        may_go_when="magnitudes and norms are fp32 beside a 16-bit adapter",
        look_again_at=_PEFT,
    ),
    Patch(
        library="peft",
        where="finetune.patches.peft.dense_weight",
        what="peft.utils.integrations.dequantize_module_weight",
        why="on a CPU it loses the scales of an int8 weight, and leaves the weight without them",
        may_go_when="it decodes an Int8Params on a CPU to the values that the layer computes with",
        look_again_at=_PEFT,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.FourBitLoading",
        what="transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer._process_model_before_weight_loading",
        why="it quantizes linear layers only: the experts of a mixture stay in 16 bits",
        may_go_when="transformers quantizes fused experts to 4 bits with bitsandbytes",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.EightBitLoading",
        what="transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer._process_model_before_weight_loading",
        why="the model's layers are known there for the first time, before any of them is replaced",
        may_go_when="transformers calls a public method before it replaces layers",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.keep_scale",
        what="transformers.models.rwkv.modeling_rwkv.RwkvModel._rescale_layers",
        why="in evaluation mode it quantizes weights once more, as FP4, and fails where layers have an adapter",
        may_go_when="it leaves layers with an adapter, and the type of their weights, as they are",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.put_in_front",
        what="transformers.models.llama4.modeling_llama4.Llama4TextExperts",
        why="experts that it does not declare stay in 16 bits: DBRX, Inkling, JetMoE, Llama 4, LongCat",
        may_go_when="transformers quantizes experts of every form to 4 bits with bitsandbytes",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.apply_gate",
        what="transformers.integrations.moe._default_apply_gate",
        why="the gate of fused experts has no public name",
        may_go_when="transformers gives the gate a public name",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.known_to_be_apart",
        what="transformers.masking_utils.find_packed_sequence_indices",
        why="it looks for packed rows in positions that it has made itself, and the host waits for the answer",
        may_go_when="transformers does not look for packed rows in positions of its own",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.checkpointed_through",
        what="transformers.modeling_layers.GradientCheckpointingLayer:_gradient_checkpointing_func",
        why="nothing else tells the saved input of a layer that recomputes from what other layers save",
        may_go_when="gradient_checkpointing_enable takes the function that a layer is checkpointed with",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.attention.wrap_attention",
        what="transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
        why="its attention functions take a mask of every pair of tokens to keep packed rows apart",
        may_go_when="each attention function is told where packed rows begin",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.attention.wrap_attention",
        what="transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
        why="it makes that mask for a model that is told where rows begin",
        may_go_when="each attention function is told where packed rows begin",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.attention.attention_name",
        what="transformers.PreTrainedConfig:_attn_implementation",
        why="the name of a model's attention implementation is private",
        may_go_when="a model's config gives the name in public",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.attention.window_of",
        what="transformers.masking_utils.causal_mask_function",
        why="a mask's window is known to the closure that makes it alone",
        may_go_when="transformers says beside its mask functions which kind each is",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.unwarmed",
        what="transformers.modeling_utils:caching_allocator_warmup",
        why="it reserves a card for a whole model of which a rank keeps a part",
        may_go_when="the quantizer is asked how much stays on the card, or a setting turns it off",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.record_as_before",
        what="transformers.utils.output_capturing._CAN_RECORD_REGISTRY",
        why="it finds what a model can return by the name of its class, which FSDP replaces: no router's loss",
        may_go_when="transformers reads _can_record_outputs from the model itself",
        look_again_at=_TRANSFORMERS,
    ),
    Patch(
        library="transformers",
        where="finetune.patches.transformers.forget_quantization",
        what="transformers.PreTrainedModel:hf_quantizer",
        why="a model that was read from a GGUF file is dense, and still counts as quantized and refuses to be saved",
        may_go_when="save_pretrained writes a model that was loaded with gguf_file",
        look_again_at=_TRANSFORMERS,
    ),
)
"""All patches, by library. Those under ``finetune.training`` still live beside the optimizers."""
