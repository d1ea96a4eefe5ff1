"""Bugs in settings, and what is said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/config/settings": (
        ["tests/unit/finetune/config/test_defaults.py", "tests/unit/finetune/test_cli.py"],
        [
            Bug(
                "RunConfig.embedded",
                "self.model.model == EMBEDDED_MODEL and self.data.data == EMBEDDED_DATA",
                "self.model.model == EMBEDDED_MODEL or self.data.data == EMBEDDED_DATA",
            ),
            Bug("ModelConfig", "'nf4'", "'fp4'"),
            Bug("TrainConfig", "clip: float = 1.0", "clip: float = 0.0"),
            Bug("", "overwrite=True", "overwrite=False"),
            Bug("TrainConfig", "checkpointing: Checkpointing = 'auto'", "checkpointing: Checkpointing = 'none'"),
            Bug("DataConfig", "train_on_prompt: bool = False", "train_on_prompt: bool = True"),
            Bug("AdapterConfig", "32.0", "16.0"),
        ],
    ),
    "finetune/config/yaml_file": (
        ["tests/unit/finetune/test_cli.py", "tests/unit/finetune/config/test_settings.py"],
        [
            Bug("as_flags", "map(shlex.quote, values)", "values"),
            Bug("load", "problems.append(unknown_setting(str(key), value))", "pass"),
            Bug("_Loader.construct_mapping", "key in seen", "False"),
            Bug("_typed", "float(value)", "value"),
            Bug("_typed", "Path(value)", "value"),
            Bug("dump", "section == 'dry'", "False"),
        ],
    ),
    "finetune/cli": (
        ["tests/unit/finetune/test_cli.py", "tests/unit/finetune/config/test_settings.py"],
        [
            Bug("parse", "validate(config)", "pass"),
            Bug("parse", "config.embedded", "False"),
            Bug("parse", "{'output': config.output.output, 'resume': True}", "{}"),
            Bug("parse", "settings = yaml_file.load(Path(flags.pop(0)))", "flags.pop(0)"),
            Bug("_parse_flags", "_refuse_late_file(flags)", "pass"),
        ],
    ),
    "finetune/config/validate": (
        ["tests/unit/finetune/test_cli.py"],
        [
            Bug("_ranges", "_at_least('rank', adapter.rank, 1)", "_at_least('rank', adapter.rank, 0)"),
            Bug("_share", "0 <= value < 1", "0 <= value <= 1"),
            Bug("_full", "model.precision in QUANTIZED", "False"),
            Bug("_at_least", "value < lowest", "value <= lowest"),
            Bug("_above_zero", "value > 0 and math.isfinite(value)", "value > 0"),
        ],
    ),
    "finetune/__init__": (
        ["tests/unit/finetune/test_missing_packages.py"],
        [
            Bug("", "sys.argv[:1] == ['-m']", "False"),
            Bug("", "find_spec(name) is None", "find_spec(name) is not None"),
        ],
    ),
    "finetune/errors": (
        ["tests/unit/finetune/test_errors.py"],
        [
            Bug("ExitCode", "OUT_OF_MEMORY = 3", "OUT_OF_MEMORY = 5"),
            Bug("TrainingError", "ExitCode.NO_LEARNING", "ExitCode.BUG"),
            Bug("WriteError", "ExitCode.CANNOT_WRITE", "ExitCode.OUT_OF_MEMORY"),
            Bug(
                "Problem.__str__",
                "f'{self.field} = {self.value!r}: {self.why}; {self.remedy}'",
                "f'{self.field} = {self.value!r}: {self.why}'",
            ),
            Bug("ConfigError.__init__", "'\\n'.join((str(problem) for problem in problems))", "str(problems[0])"),
            Bug("OutOfMemoryError.__init__", "savings", "()"),
            Bug("ExitCode", "130", "128"),
        ],
    ),
    "pytest_vram/shapes/__init__": (
        ["tests/unit/finetune/model/test_shapes.py"],
        [
            Bug("find_shape", "asked.removeprefix('meta-')", "asked"),
            Bug("find_shape", "found.hub.partition('/')[0].lower()", "found.hub.partition('/')[0]"),
            Bug(
                "find_shape",
                "owner and owner != found.hub.partition('/')[0].lower()",
                "not owner and owner != found.hub.partition('/')[0].lower()",
            ),
            Bug("", "'(?:-(?:instruct|it|chat|hf|v0\\\\.[1-3]))+$'", "'(?:-(?:instruct|it|chat|hf|v0\\\\.[1-3]))$'"),
            Bug("near_shapes", "list(dict.fromkeys((_NAMES[other].name for other in near)))", "near"),
            Bug("near_shapes", "cutoff", "1 - cutoff"),
            Bug("", "7241732096", "7241748480"),
        ],
    ),
    "finetune/dryrun/card": (
        ["tests/unit/finetune/dryrun/test_command.py"],
        [
            Bug("named_card", "return find_card(name)", "return find_card('t4')"),
            Bug("named_card", "str(error)", "''"),
        ],
    ),
    "finetune/model/shapes": (
        ["tests/unit/finetune/model/test_shapes.py"],
        [
            Bug("load_shape", "shape is None", "False"),
            Bug("_unknown", "near_shapes(name)", "[]"),
            Bug("_unknown", "', '.join(SHAPES)", "''"),
            Bug("_unknown", "value=name", "value=None"),
            Bug("load_shape", "shape.fields()", "find_shape('mistral-7b').fields()"),
        ],
    ),
    "pytest_vram/report/likely": (
        ["tests/unit/pytest_vram/report/test_likely.py"],
        [
            Bug("spread", "row.metric == 'allocated'", "row.metric != 'allocated'"),
            Bug("on_device", "found.shifted(context_bytes)", "found"),
            Bug("verdict", "found.straddles(limit)", "not found.straddles(limit)"),
            Bug("lines", "row.budget_bytes is None", "True"),
            Bug("words", "format_bytes(found.high)", "format_bytes(found.low)"),
        ],
    ),
}
