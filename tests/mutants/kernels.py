"""Bugs in the fused kernels and in the optimizer that uses one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/training/split": (
        ["tests/e2e/drygpu/test_dry_split.py", "tests/unit/finetune/training/test_split.py"],
        [
            Bug("keep_gradients", "size <= spare", "True"),
            Bug("keep_gradients", "spare is None", "True"),
            Bug("_Trials.__init__", "_tidy(model)", "pass"),
            Bug("chosen_split", "trials.budget - chosen.needed if chosen.fits else 0", "None"),
            Bug("chosen_split", "now.split == 'auto' and rows > 1", "rows > 1"),
            Bug("chosen_split", "reason or not split_open", "not split_open"),
            Bug(
                "chosen_split",
                "range(layers + 1) if layers_open else [layers_recomputed(now.checkpointing, layers)]",
                "range(layers + 1)",
            ),
            Bug("chosen_split", "choice.recomputed > 1", "True"),
            Bug("_tidy", "parameter.grad = None", "pass"),
            Bug("_at_most", "min(share, before)", "before"),
            Bug("_at_most", "torch.cuda.set_per_process_memory_fraction(before, device)", "pass"),
            Bug("as_recorded", "config.train.split == 'auto' and same", "same"),
            Bug("as_recorded", "getattr(config.train, name) == 'auto'", "True"),
            Bug("as_recorded", "config.train.split == 'auto' and same", "config.train.split == 'auto'"),
        ],
    ),
    "finetune/model/host_inputs": (
        ["tests/properties/model/test_host_inputs.py"],
        [
            Bug("Store.settle", "self._copies.wait(mark)", "pass"),
            Bug("Store.arrived", "self._copies.wait(mark)", "pass"),
            Bug("Store._buffer", "len(buffer) >= size", "True"),
            Bug("Store._buffer", "self._refused = True", "pass"),
            Bug("Kept.__del__", "self.store.take_back(self.host)", "pass"),
            Bug("Pass._pack", "self._count == self._layers", "False"),
            Bug("Pass._unpack", "kept.before is not None", "False"),
            Bug("_recomputing", "getattr(module, 'gradient_checkpointing', False)", "True"),
            Bug("_require_unchanged", "tensor._version != version", "False"),
        ],
    ),
    "finetune/model/host_copies": (
        ["tests/unit/finetune/model/test_host_copies.py", "tests/e2e/drygpu/test_dry_step_work.py"],
        [
            Bug("CardCopies.start", "target.copy_(source, non_blocking=True)", "target.copy_(source)"),
            Bug("CardCopies.free", "torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())", "0"),
            Bug(
                "CardCopies.allocate",
                "torch.cuda.cudart().cudaHostRegister(memory.data_ptr() + begin, pages, 0)",
                "0",
            ),
            Bug("has_room", "is_active()", "False"),
            Bug("has_room", "host_memory.pinnable_bytes()", "host_memory.available_bytes()"),
            Bug("require_room", "not has_room(size, room)", "False"),
            Bug("CardCopies.allocate", "self._room is None", "True"),
            Bug("CardCopies.allocate", "self._room - sum(self._pinned.values())", "self._room"),
            Bug("CardCopies.free", "not self._pinned", "False"),
        ],
    ),
    "finetune/config/split": (
        ["tests/unit/finetune/config/test_split.py"],
        [
            Bug("with_batch", "1 if train.split == 'auto' else train.micro_batch", "train.micro_batch"),
            Bug("with_batch", "train.batch // micro_batch", "train.batch"),
            Bug("expanded", "words += ['--batch', 'None']", "pass"),
            Bug("expanded", "'--split' not in words", "False"),
            Bug("_apart", "name.replace('_', '-')", "name"),
        ],
    ),
    "finetune/kernels/packed_attention": (
        ["tests/properties/kernels/test_packed_attention.py"],
        [
            Bug("keep_rows_apart", "why_rows_mix(model) is not None", "False"),
            Bug("_in_one_kernel", "mask.window is None", "False"),
            Bug("_in_one_kernel", "getattr(attend, '__name__', '') != 'sdpa_attention_forward'", "False"),
            Bug("_all_at_once", "mask.window[0] < rows.longest - 1", "False"),
            Bug("_all_at_once", "value = F.pad(value, (0, narrower))", "pass"),
            Bug("_one_by_one", "begin += size", "begin = size"),
            Bug("_mask", "given.get('allow_is_causal_skip', True)", "True"),
        ],
    ),
    "finetune/model/packed_rows": (
        ["tests/properties/kernels/test_packed_attention.py"],
        [
            Bug("PackedRows.of", "torch.tensor(lengths).cumsum(0)", "torch.tensor(lengths)"),
            Bug("PackedRows.longest", "max(self.lengths)", "self.lengths[0]"),
            Bug("told_of_rows", "way == 'lengths'", "False"),
            Bug("told_of_rows", "rows.longest", "1"),
            Bug("told_of_rows", "_CURRENT.reset(token)", "pass"),
            Bug("told_of_rows", "len(lengths) == len(batch.input_ids)", "len(lengths) == 1"),
        ],
    ),
    "finetune/patches/attention": (
        ["tests/properties/kernels/test_packed_attention.py"],
        [
            Bug("window_of", "(size - 1, 0)", "(size, 0)"),
            Bug("window_of", "torch.equal(seen, expected)", "True"),
            Bug("window_of", "mask_function is masking_utils.causal_mask_function", "True"),
            Bug("wrap_attention", "not _is_wrapped(masks[name])", "False"),
            Bug("wrap_attention", "not _is_wrapped(code.eager_attention_forward)", "False"),
        ],
    ),
    "finetune/training/adamw": (
        ["tests/properties/training/test_adamw.py"],
        [
            Bug("update_in_torch", "master = master * numbers.shrink", "pass"),
            Bug("update_in_torch", "joined(of.weight, of.dropped)", "of.weight.float()"),
            Bug("update_in_torch", "split(master, of.weight, of.dropped)", "of.weight.copy_(master)"),
            Bug("update_in_torch", "gradient * numbers.rest2 * gradient", "gradient * numbers.rest2"),
            Bug("Coefficients.of", "eps * second", "eps"),
            Bug("Coefficients.of", "-lr * second / (1.0 - betas[0] ** step)", "-lr"),
        ],
    ),
    "finetune/training/adamw_kernel": (
        ["tests/properties/training/test_adamw_kernel.py"],
        [
            Bug("_rounded_bf16", "bits >> 16 & 1", "1"),
            Bug("_adamw", "nearest += (left == 32768).to(tl.int32)", "pass"),
            Bug("_adamw", "gradient * rest2 * gradient", "gradient * gradient * rest2"),
            Bug("_adamw", "tl.sqrt_rn(second) + eps", "tl.sqrt_rn(second + eps)"),
            Bug("_adamw", "tl.load(table + middle) <= block", "tl.load(table + middle) < block"),
            Bug("_adamw", "at < size", "at <= size"),
        ],
    ),
    "finetune/training/paged_adamw": (
        ["tests/properties/training/test_adamw_kernel.py", "tests/properties/training/test_masters.py"],
        [
            Bug("PagedAdamW._update", "state['step'] += 1", "state['step'] = 1"),
            Bug("PagedAdamW._update", "state.get(DROPPED)", "None"),
            Bug("PagedAdamW.__init__", "keep_masters(self)", "pass"),
            Bug("PagedAdamW.step", "[p for p in group['params'] if not _is_ours(p)]", "group['params']"),
            Bug("PagedAdamW.step", "group['params'] = parameters", "pass"),
            Bug("PagedAdamW._numbers", "group['weight_decay']", "0.0"),
            Bug("PagedAdamW.compile_kernel", "[stand_in] * count", "[stand_in]"),
        ],
    ),
    "finetune/kernels/available": (
        ["tests/unit/finetune/kernels/test_available.py"],
        [
            Bug("kernel_runs_on", "os.environ.get('TRITON_INTERPRET') == '1'", "True"),
            Bug("kernel_runs_on", "not triton_is_installed()", "False"),
            Bug("can_launch", "is_active() or _can_compile()", "True"),
            Bug("_can_compile", "headers.is_file()", "True"),
            Bug("_can_compile", "'CC' in os.environ", "False"),
        ],
    ),
    "finetune/kernels/choice": (
        ["tests/unit/finetune/kernels/test_choice.py"],
        [
            Bug("check_kernels", "name != 'liger'", "True"),
            Bug("check_kernels", "device.type != 'cuda'", "False"),
            Bug("set_kernels", "name == 'torch'", "False"),
            Bug("set_kernels", "getattr(model, _SET, False)", "False"),
            Bug("_apply_liger", "activation in computes and (not _is_mixture(base))", "activation in computes"),
            Bug("_apply_liger", "activation in computes and (not _is_mixture(base))", "not _is_mixture(base)"),
            Bug("", "{'cross_entropy': False, 'fused_linear_cross_entropy': False, 'layer_norm': False}", "{}"),
        ],
    ),
    "finetune/kernels/fused_adapter": (
        ["tests/properties/kernels/test_fused_adapter.py"],
        [
            Bug("_FusedLora.forward", "flat_y.addmm_(part, up.t(), alpha=scale)", "flat_y.addmm_(part, up.t())"),
            Bug("_FusedLora.forward", "outputs.append(y)", "outputs.append(flat_y.view(y.shape))"),
            Bug("_FusedLora.forward", "base.bias is None", "True"),
            Bug("_FusedLora.backward", "grad_x.addmm_(of, weight)", "grad_x"),
            Bug("_FusedLora.backward", "grad_x.addmm_(grad_inner, stacked)", "grad_x"),
            Bug(
                "_FusedLora.backward",
                "torch.addmm(grad_part, of, up, beta=0, alpha=scale, out=grad_part)",
                "torch.mm(of, up, out=grad_part)",
            ),
            Bug("_Group.call", "if same:", "if True:"),
            Bug("_Member.is_ready", "layer.disable_adapters", "False"),
            Bug("_run", "len(members) == 1 and torch.is_grad_enabled()", "False"),
            Bug("_FusedLora.backward", "[matrix._version for matrix in matrices] != ctx.versions", "False"),
            Bug("_obstacle", "not isinstance(layer.lora_dropout[name], nn.Identity)", "False"),
        ],
    ),
    "finetune/kernels/cross_entropy": (
        ["tests/properties/kernels/test_cross_entropy.py"],
        [
            Bug("_cross_entropy", "here = column < words", "here = column <= words"),
            Bug("_cross_entropy", "tl.where(column < words, gradient, 0.0)", "gradient"),
            Bug("_cross_entropy", "total * tl.exp(largest - higher)", "total"),
            Bug("_cross_entropy", "tl.where(column == target, 1.0, 0.0)", "0.0"),
            Bug("_cross_entropy", "unit * scale", "unit"),
            Bug("_cross_entropy", "gradient * (1.0 - value / softcap * (value / softcap))", "gradient"),
            Bug("losses_and_gradient", "min(rule.words, columns)", "columns"),
        ],
    ),
    "finetune/kernels/nf4": (
        ["tests/properties/kernels/test_nf4.py"],
        [
            Bug("_decode", "scale = scale + tl.load(scale_mean)", "pass"),
            Bug("_decode", "place ^ 1", "place"),
            Bug("_decode", "block // scales_block", "block * 0"),
            Bug("_decode", "word_at < words", "word_at < words - 1"),
            Bug("can_decode", "state.quant_type != 'nf4'", "False"),
            Bug("can_decode", "state.shape.numel() % _CODES", "False"),
            Bug("_decode", "tl.program_id(0).to(tl.int64) * count", "tl.program_id(0).to(tl.int64)"),
        ],
    ),
    "finetune/patches/liger": (
        ["tests/unit/finetune/kernels/test_choice.py"],
        [
            Bug("apply_kernels", "model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN", "False"),
            Bug("apply_kernels", "return True", "return False"),
        ],
    ),
}
