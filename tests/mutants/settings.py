"""Bugs in settings, and what is said of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/config/settings": (
        ["tests/unit/finetune/config/test_defaults.py", "tests/unit/finetune/test_cli.py"],
        [
            ("and self.data.data == EMBEDDED_DATA", "or self.data.data == EMBEDDED_DATA"),
            ('precision: Precision = "nf4"', 'precision: Precision = "fp4"'),
            ("clip: float = 1.0", "clip: float = 0.0"),
            ("overwrite=True, save_every=10", "overwrite=False, save_every=10"),
            ("checkpointing: bool = True", "checkpointing: bool = False"),
            ("train_on_prompt: bool = False", "train_on_prompt: bool = True"),
            ("alpha: float = 32.0", "alpha: float = 16.0"),
        ],
    ),
    "finetune/config/yaml_file": (
        ["tests/unit/finetune/test_cli.py", "tests/unit/finetune/config/test_settings.py"],
        [
            ("problems.append(unknown_setting(str(key), value))", "pass"),
            ("if key in seen:", "if False:"),
            ("return float(value)", "return value"),
            ("return Path(value)", "return value"),
            ('if section == "dry":', "if False:"),
        ],
    ),
    "finetune/cli": (
        ["tests/unit/finetune/test_cli.py", "tests/unit/finetune/config/test_settings.py"],
        [
            ("validate(config)\n    return config", "return config"),
            ("if config.embedded:", "if False:"),
            ('here = {"output": config.output.output, "resume": True}', "here = {}"),
            ("settings = yaml_file.load(Path(flags.pop(0)))", "flags.pop(0)"),
            ("_refuse_late_file(flags)\n", "pass\n"),
        ],
    ),
    "finetune/config/validate": (
        ["tests/unit/finetune/test_cli.py"],
        [
            ('yield from _at_least("rank", adapter.rank, 1)', 'yield from _at_least("rank", adapter.rank, 0)'),
            ("if not 0 <= value < 1:", "if not 0 <= value <= 1:"),
            ("if adapter.full and model.precision in QUANTIZED:", "if False:"),
            ("if value < lowest:", "if value <= lowest:"),
            ("if not (value > 0 and math.isfinite(value)):", "if not value > 0:"),
        ],
    ),
    "finetune/errors": (
        ["tests/unit/finetune/test_errors.py"],
        [
            ("OUT_OF_MEMORY = 3\n    CANNOT_WRITE = 4", "OUT_OF_MEMORY = 4\n    CANNOT_WRITE = 3"),
            ("exit_code = ExitCode.NO_LEARNING", "exit_code = ExitCode.BUG"),
            ("exit_code = ExitCode.CANNOT_WRITE", "exit_code = ExitCode.OUT_OF_MEMORY"),
            ("{self.why}; {self.remedy}", "{self.why}"),
            ('"\\n".join(str(problem) for problem in problems)', "str(problems[0])"),
            ("self.savings = savings", "self.savings = ()"),
            ("INTERRUPTED = 130", "INTERRUPTED = 128"),
        ],
    ),
    "finetune/estimate/shapes/__init__": (
        ["tests/unit/finetune/estimate/test_shapes.py"],
        [
            ('asked.removeprefix("meta-")', "asked"),
            ('found.hub.partition("/")[0].lower()', 'found.hub.partition("/")[0]'),
            ("if found is None or (owner and owner != ", "if found is None or (not owner and owner != "),
            (r"v0\.[1-3]))+$", r"v0\.[1-3]))$"),
            ("list(dict.fromkeys(_NAMES[other].name for other in near))", "near"),
            ("n=3, cutoff=cutoff", "n=3, cutoff=1 - cutoff"),
            ("parameters=7_241_732_096", "parameters=7_241_748_480"),
        ],
    ),
}
