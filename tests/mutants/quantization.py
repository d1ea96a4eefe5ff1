"""Bugs in numbers in 4 and 8 bits, and a mixture's experts in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "tests/reference/nf4": (
        [
            "tests/properties/reference/test_nf4_invariants.py",
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            Bug("pack", "codes[::2] << 4 | codes[1::2]", "codes[1::2] << 4 | codes[::2]"),
            Bug("_scale_blocks", "scaled[-1] = (blocks[-1] / absmax[-1]).clamp(-1, 1)", "pass"),
            Bug(
                "scales",
                "state2.code[quantized.absmax.long()] * per_scale + quantized.offset",
                "state2.code[quantized.absmax.long()] * per_scale",
            ),
            Bug("encode", "codes = codes.masked_fill(scaled.isnan(), 0)", "pass"),
            Bug("state_dict", "quantized.offset.item()", "0.0"),
            Bug("_scale_blocks", "row_max(blocks.abs())", "blocks.amax(dim=1)"),
        ],
    ),
    "tests/reference/blockwise": (
        [
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            Bug(
                "quantize_blockwise",
                "(scaled.nan_to_num(0.0).clamp(-1, 1) + 1.0) * 0.5 * 65535 + 0.5",
                "(scaled.nan_to_num(0.0).clamp(-1, 1) + 1.0) * 0.5 * 65535",
            ),
            Bug("quantize_blockwise", "below % 2 == 1", "below % 2 == 0"),
            Bug("quantize_blockwise", "codes = codes.masked_fill((absmax == 0)[:, None], 0)", "pass"),
            Bug("dequantize_blockwise", "absmax.repeat_interleave", "absmax.repeat"),
            Bug("", "256", "128"),
        ],
    ),
    "tests/reference/codebook": (
        [
            "tests/properties/reference/test_nf4_invariants.py",
            "tests/properties/reference/test_nf4_bounds.py",
            "tests/properties/reference/test_nf4_bitsandbytes.py",
            "tests/properties/reference/test_nf4_cuda_rules.py",
        ],
        [
            Bug("", "0.07958029955625534", "0.0795804"),
            Bug("midpoints", "(values[:-1] + values[1:]) / 2", "values[1:]"),
            Bug("dynamic_map", "decade - 6", "decade - 7"),
            Bug(
                "snapped_lookup",
                "torch.arange(65536, dtype=torch.float32) * 2.0 / 65535",
                "torch.arange(65536, dtype=torch.float32) * 2.0 / 65536",
            ),
            Bug("", "0.00260417", "0.0026041667"),
        ],
    ),
    "finetune/patches/table": (
        ["tests/unit/finetune/patches/test_table.py"],
        [
            Bug("", "'peft.tuners.lora.dora.DoraLinearLayer'", "'peft.tuners.lora.dora.DoraLayer'"),
            Bug("", "'finetune.patches.peft.make_precise'", "'finetune.patches.peft.precise'"),
        ],
    ),
    "finetune/patches/transformers": (
        [
            "tests/properties/model/test_declared_experts.py",
            "tests/properties/model/test_qlora_refusals.py",
            "tests/unit/finetune/model/test_gguf.py",
        ],
        [
            Bug("FourBitLoading._process_model_before_weight_loading", "self.complete(model, device_map)", "pass"),
            Bug("EightBitLoading._process_model_before_weight_loading", "self.prepare(model)", "pass"),
            Bug("apply_gate", "source._apply_gate(experts, value)", "value"),
            Bug("is_expert_parallel", "getattr(experts, '_is_expert_parallel', False)", "True"),
            Bug("forget_quantization", "model.hf_quantizer = None", "pass"),
            Bug("keep_scale", "hasattr(decoder, '_rescale_layers')", "False"),
        ],
    ),
    "finetune/model/experts": (
        [
            "tests/properties/model/test_declared_experts.py",
            "tests/properties/model/test_qlora_refusals.py",
            "tests/properties/training/test_qlora_step.py",
        ],
        [
            Bug(
                "QuantizedExperts.forward",
                "apply_gate(source, self, value) if own.has_gate else own.act_fn(value)",
                "own.act_fn(value)",
            ),
            Bug(
                "QuantizedExperts._linear",
                "result + getattr(self, f'{weight}_bias')[expert] if self.has_bias else result",
                "result",
            ),
            Bug("QuantizedExperts.quantize", "values = values.transpose(1, 2)", "pass"),
            Bug("QuantizedExperts.forward", "(slots, None)", "0"),
            Bug("refuse_misread_layers", "if wrong:", "if False:"),
            Bug("QuantizedExperts.quantize", "self.quant_type", "'nf4'"),
            Bug("FourBitQuantizer.complete", "declared_experts(module)", "True"),
            Bug("FourBitQuantizer.param_needs_quantization", "is_packed(module, name)", "False"),
            Bug("require_whole", "parts.wanted() and (not declared_experts(module))", "False"),
        ],
    ),
    "finetune/model/load_errors": (
        ["tests/unit/finetune/model/test_load_errors.py"],
        [
            Bug("explained", "'trust_remote_code' in text", "False"),
            Bug("explained", "'for this kind of AutoModel' in text", "False"),
            Bug("explained", "re.match(\"'\\\\w+Config' object has no attribute\", text)", "None"),
            Bug("explained", "isinstance(error, ImportError)", "False"),
            Bug("explained", "text.partition('\\n')[0].strip() or 'no reason is given'", "text"),
            Bug("explained", "f'{type(error).__name__}: {said}'", "said"),
        ],
    ),
    "finetune/model/packed_weight": (
        ["tests/properties/model/test_packed_weight.py"],
        [
            Bug("PackedWeight.__torch_dispatch__", "function in _VIEWS", "False"),
            Bug("PackedWeight.decoded", "first - first % _GROUP", "0"),
            Bug("PackedWeight.decoded", "first - first % _GROUP", "first - first % BLOCK"),
            Bug("PackedWeight.decoded", "min(end, self._stored.state.shape.numel())", "last"),
            Bug("_Stored.decoded", "state.state2.absmax[begin // _GROUP:-(-end // _GROUP)]", "state.state2.absmax"),
            Bug("_Stored.decoded", "state.absmax[begin // BLOCK:-(-end // BLOCK)]", "state.absmax"),
            Bug("quantized", "if double_quant:", "if False:"),
            Bug("quantized", "packed[begin // 2:begin // 2 + len(piece)] = piece", "packed[:len(piece)] = piece"),
            Bug("_reader", "states is None", "False"),
        ],
    ),
}
