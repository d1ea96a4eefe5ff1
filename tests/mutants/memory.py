"""Bugs in what holds memory, on the card and on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/model/recompute": (
        ["tests/unit/finetune/model/test_recompute.py"],
        [
            Bug("layers_of", "not layers or None in layers", "not layers"),
            Bug(
                "_search",
                "yield _Place(module, name)",
                "(yield _Place(module, name), (yield from _search(child, seen)))",
            ),
            Bug("set_recompute", "setting > len(layers)", "False"),
            Bug("set_recompute", "layer.gradient_checkpointing = number < count", "pass"),
            Bug("usable", "set_checkpointing(model, enabled=False)", "pass"),
            Bug("usable", "setting != 'auto'", "True"),
        ],
    ),
    "finetune/disk/host_memory": (
        ["tests/unit/finetune/disk/test_host_memory.py"],
        [
            Bug(
                "peak_resident_bytes",
                "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024",
                "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
            ),
            Bug("resident_bytes", "'VmRSS'", "'VmHWM'"),
            Bug(
                "limit_bytes",
                "min((limit for limit in limits if 0 < limit < _UNLIMITED))",
                "max((limit for limit in limits if 0 < limit < _UNLIMITED))",
            ),
            Bug("peak_resident_bytes", "'VmHWM'", "'VmRSS'"),
            Bug("limit_bytes", "('memory.max', 'memory/memory.limit_in_bytes')", "('memory/memory.limit_in_bytes',)"),
            Bug("available_bytes", "max(0, limit - held)", "limit"),
            Bug("limit_bytes", "limits.append(address_space)", "pass"),
        ],
    ),
    "pytest_vram/process_memory": (
        [
            "tests/unit/pytest_vram/test_process_memory.py",
            "tests/unit/finetune/disk/test_host_memory.py",
        ],
        [
            Bug("read_fields", "int(rest.split()[0]) * KIB", "int(rest.split()[0]) * 1000"),
            Bug("read_fields", "errors='replace'", "errors='strict'"),
            Bug("read_fields", "name in names", "name.startswith(names)"),
            Bug("give_back_freed", "ctypes.CDLL(None).malloc_trim(0)", "ctypes.CDLL(None).malloc_trim"),
        ],
    ),
    "finetune/training/host_base": (
        ["tests/unit/finetune/training/test_host_base.py"],
        [
            Bug("require_host_memory", "part * launch.local_size()", "part"),
            Bug("require_host_memory", "ranks=launch.size()", "ranks=1"),
            Bug("require_host_memory", "host_memory.pinnable_bytes()", "host_memory.available_bytes()"),
            Bug("require_host_memory", "has_room(here)", "has_room(part)"),
            Bug("require_host_memory", "not config.model.offload_base", "False"),
        ],
    ),
    "finetune/training/oom": (
        ["tests/unit/finetune/training/test_oom.py"],
        [
            Bug("_alternatives", "now['accumulation'] * now['micro_batch']", "now['accumulation']"),
            Bug("largest_savings", "-s.saved_bytes", "s.saved_bytes"),
            Bug(
                "Holdings.bytes_by_holder",
                "'trained weights' if parameter.requires_grad else base",
                "base if parameter.requires_grad else 'trained weights'",
            ),
            Bug(
                "_stored",
                "weight.nbytes + sum((constant.nbytes for constant in quantization_constants(weight)))",
                "weight.nbytes",
            ),
            Bug("_estimated", "0 if on_device else found.managed", "found.managed if on_device else 0"),
            Bug("largest_savings", "s.saved_bytes > 0", "s.flags"),
            Bug("explained", "traceback.clear_frames(error.__traceback__)", "pass"),
            Bug("_explain", "held - sum(parts.values())", "held"),
        ],
    ),
    "finetune/model/full_shard": (
        ["tests/e2e/finetune/test_full_shard.py"],
        [
            Bug("shard_all", "module.set_gradient_divide_factor(1.0)", "pass"),
            Bug("shard_all", "mark_sharded(model)", "pass"),
            Bug("parts_of_states", "_own(parameter).numel()", "True"),
            Bug("_part", "part_of(value)", "value"),
            Bug("_shared", "count > 1", "False"),
        ],
    ),
    "finetune/training/sharded": (
        ["tests/e2e/finetune/test_full_shard.py"],
        [
            Bug("optimizer_of", "hand_over(model, optimizer)", "pass"),
            Bug("clip_parts", "torch.distributed.all_reduce(squares[1:])", "pass"),
            Bug("restore", "part_of(whole)", "whole"),
            Bug("spread", "shard_all(model, resolve_device(config.model))", "pass"),
            Bug("trained_here", "parts is None", "True"),
        ],
    ),
    "finetune/patches/bitsandbytes": (
        ["tests/properties/model/test_int8_inputs.py", "tests/unit/finetune/patches/test_bitsandbytes.py"],
        [
            Bug("rows_by_themselves", "state.threshold = 0.0", "pass"),
            Bug("rows_by_themselves", "state.threshold = threshold", "pass"),
            Bug("keep_weights_unpacked", "module.support_avx512bf16_for_cpu = False", "pass"),
            Bug("keep_no_inputs", "type(module) is bnb.nn.Linear8bitLt", "False"),
            Bug("", "127", "128"),
            Bug("FrozenLinear8bit.forward", "x.requires_grad and torch.is_grad_enabled()", "False"),
            Bug(
                "_Product.forward",
                "ctx.layer, ctx.dtype = (layer, x.dtype)",
                "ctx.layer, ctx.dtype, ctx.x = (layer, x.dtype, x)",
            ),
            Bug("_Product.backward", "grad.to(ctx.dtype) @ weight", "grad.to(ctx.dtype) @ (2 * weight)"),
        ],
    ),
}
