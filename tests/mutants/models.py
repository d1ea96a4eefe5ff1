"""Bugs in what a model is, and where its adapter goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/model/layers": (
        ["tests/properties/model/test_layer_targets.py", "tests/properties/model/test_declared_experts.py"],
        [
            Bug(
                "experts_of",
                "declared_experts(module) or 'Expert' in type(module).__name__",
                "declared_experts(module)",
            ),
            Bug("why_not_plain", "leaf in _read_by(type(parent))", "False"),
            Bug("why_not_plain", "_is_router(leaf, module, parent, counts)", "False"),
            Bug("_is_product", "result.shape != (1, module.out_features)", "False"),
            Bug("linear_layers", "name.startswith(inside)", "False"),
            Bug(
                "experts_of",
                "declared_experts(module) or 'Expert' in type(module).__name__",
                "'Expert' in type(module).__name__",
            ),
        ],
    ),
    "finetune/model/targets": (
        ["tests/properties/model/test_layer_targets.py"],
        [
            Bug("_unfit", "not path.startswith(inside) or path.startswith(foreign)", "False"),
            Bug("_unfit", "layer is head", "False"),
            Bug("_unfit", "'.patcher.' in path", "False"),
            Bug("choose", "not matched", "False"),
            Bug("choose", "field == 'targets' and None not in why", "False"),
            Bug("choose", "reasons.setdefault(path, _EXCLUDED)", "pass"),
            Bug("choose", "path not in reasons", "True"),
            Bug(
                "_unfit",
                "[name for name, child in parts.items() if _sees_or_hears(child)]",
                "list(parts)",
            ),
        ],
    ),
    "finetune/model/installed": (
        ["tests/unit/finetune/model/test_installed.py"],
        [
            Bug("require_bitsandbytes", "f'pip install bitsandbytes, or use --{field} {instead}'", "instead"),
            Bug("require_bitsandbytes", "value=value", "value=instead"),
        ],
    ),
    "finetune/model/names": (
        ["tests/properties/model/test_layer_targets.py", "tests/unit/finetune/estimate/test_arithmetic.py"],
        [
            Bug("matches", "f'.{name}.' in f'.{path}.'", "name in path"),
            Bug("names_of", "not any((matches(n, path) for path in others))", "True"),
            Bug("names_of", "not parts[begin].isdigit()", "parts[begin]"),
            Bug(
                "wanted",
                "named and (not any((matches(name, path) for name in exclude)))",
                "named or any((matches(name, path) for name in exclude))",
            ),
            Bug("wanted", "target == ALL_LINEAR or matches(target, path)", "matches(target, path)"),
            Bug("names_of", "[path for path in rest if not matches(name, path)]", "rest[1:]"),
        ],
    ),
    "finetune/model/adapters": (
        ["tests/properties/model/test_started_models.py", "tests/properties/model/test_layer_targets.py"],
        [
            Bug("load_adapter", "not trainable", "True"),
            Bug("_fill", "if lost:", "if False:"),
            Bug("_as_saved", "paths <= layers", "False"),
            Bug("settled", "_number(name, saved, 'lora_alpha')", "_number(name, saved, 'r')"),
            Bug("settled", "if problems:", "if False:"),
        ],
    ),
    "finetune/model/whole": (
        ["tests/properties/model/test_broken_folders.py"],
        [
            Bug("require_weights", "key in parameters", "False"),
            Bug("_other_shapes", "stored is not None and stored != wanted", "False"),
            Bug("require_weights", "if unused:", "if False:"),
            Bug("not_finite", "parameter.requires_grad", "False"),
            Bug("not_finite", "low.isfinite() & high.isfinite()", "low.isfinite()"),
            Bug("_damaged_weights", "set(named.values()) - {file.name for file in files}", "()"),
            Bug("damage", "not isinstance(found, dict)", "False"),
            Bug("_stored_shape", "type(weight).__name__ == 'Int8Params'", "False"),
        ],
    ),
    "finetune/model/settle": (
        ["tests/properties/model/test_started_models.py"],
        [
            Bug("settled", "model.precision not in (stored, ModelConfig().precision)", "False"),
            Bug("settled", "config.adapter.full or config.output.merge != 'none'", "False"),
            Bug("stored_precision", "'nf4' if kind == 'nf4' else 'fp4'", "'nf4'"),
            Bug("stored_precision", "'int8'", "'nf4'"),
            Bug("settled", "dataclasses.replace(model, precision=stored)", "model"),
        ],
    ),
    "finetune/model/parts": (
        ["tests/unit/finetune/model/test_parts.py"],
        [
            Bug("part_of", "chunks[rank]", "chunks[0]"),
            Bug("keep_of_experts", "number not in own", "False"),
            Bug("empty_passes", "int(most) - count", "int(most)"),
            Bug("empty_passes", "torch.full_like(ids, IGNORED)", "ids"),
            Bug("_first", "values.reshape(-1)[:SAMPLE]", "values.reshape(-1)[:1]"),
        ],
    ),
    "finetune/model/host_parts": (
        ["tests/unit/finetune/model/test_host_parts.py"],
        [
            Bug("HostParts.copy", "self._used += room", "pass"),
            Bug("HostParts.copy", "max(PIECE, room)", "PIECE"),
            Bug("HostParts.copy", "found.copy_(values)", "found"),
            Bug("HostParts._taken", "require_room(size)", "pass"),
            Bug("HostParts._taken", "raise self.refused from error", "raise error"),
        ],
    ),
    "finetune/model/shard": (
        ["tests/unit/finetune/model/test_shard.py", "tests/e2e/finetune/test_shard.py"],
        [
            Bug("_require_all_in", "times[id(module)] == 1", "True"),
            Bug("_GatheredStates.__getitem__", "scales[index]", "scales[0]"),
            Bug("shard_base", "record_as_before(decoder)", "pass"),
            Bug("_open_linear", "whole.scales", "None"),
            Bug("_set_aside", "parameter.data if size is not None else part_of(parameter.data)", "parameter.data"),
        ],
    ),
}
