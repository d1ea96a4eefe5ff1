"""Command-line options and their ini twins, read once into frozen settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram import units
from pytest_vram.errors import VramUsageError
from pytest_vram.plugin.marks import METRICS, limit_bytes
from pytest_vram.probe.select import Choice, parse_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

UNMEASURED = ("skip", "fail", "warn")
REQUIRABLE = ("cuda", "dry", "host")
SUFFIXES = (".json", ".md", ".csv", ".html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: ``--vram-name`` on the command line, ``vram_name`` in the ini file; the command line wins."""

    name: str
    help: str
    kind: str = "text"
    """``text``, ``flag`` or ``list``."""
    metavar: str | None = None
    ini_only: bool = False

    @property
    def dest(self) -> str:
        """Name in the ini file and among pytest's options."""
        return f"vram_{self.name}"

    @property
    def flag(self) -> str:
        """Name on the command line."""
        return f"--vram-{self.name.replace('_', '-')}"


OPTIONS = (
    Option(name="report", kind="flag", help="print a table of GPU memory by test at the end"),
    Option(
        name="output",
        kind="list",
        metavar="PATH",
        help="write the report to PATH: .json, .md, .csv or .html; may be repeated",
    ),
    Option(
        name="gpu",
        metavar="auto|cuda|dry[:CARD]|host|nvml|off",
        help=(
            "what to measure on. auto: a GPU if there is one, else a dry GPU, else CPU tensors. dry: PyTorch's real"
            " allocator over a stub driver, for instance dry:rtx-4080 (`python -m pytest_vram cards`)"
        ),
    ),
    Option(name="require", metavar="cuda|dry|host", help="fail at the start unless figures are of this kind: for CI"),
    Option(name="baseline", metavar="FILE", help="compare peaks with FILE; a test that grew past the tolerance fails"),
    Option(name="update_baseline", kind="flag", help="write the peaks of the tests that ran into the baseline FILE"),
    Option(name="tolerance", metavar="PCT", help="growth over the baseline that passes, in percent (default 2)"),
    Option(
        name="suggest",
        kind="flag",
        help="print a marker for each measured test that has none, or much too large a one",
    ),
    Option(name="top", metavar="N", help="allocations shown for a test that broke its budget (default 5)"),
    Option(name="max_gb", metavar="GB", ini_only=True, help="budget of tests that have no marker, in GB (2**30 bytes)"),
    Option(name="metric", metavar="METRIC", ini_only=True, help="metric of vram_max_gb: allocated, reserved or device"),
    Option(
        name="on_unmeasured",
        metavar="skip|fail|warn",
        ini_only=True,
        help="what becomes of a budgeted test that cannot be measured (default skip)",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a session."""

    report: bool
    output: tuple[Path, ...]
    gpu: Choice
    require: str | None
    baseline: Path | None
    update_baseline: bool
    tolerance_percent: float
    suggest: bool
    top: int
    max_bytes: int | None
    metric: str
    on_unmeasured: str

    @property
    def measures_all(self) -> bool:
        """Whether tests without a marker are measured too."""
        return bool(self.report or self.output or self.baseline or self.suggest or self.max_bytes)


def add_options(parser: pytest.Parser) -> None:
    """Register every option and its ini twin."""
    group = parser.getgroup("vram", "GPU memory budgets (pytest-vram)")
    for option in OPTIONS:
        if not option.ini_only:
            settings: dict[str, Any] = {"dest": option.dest, "default": None, "help": option.help}
            if option.kind == "flag":
                settings |= {"action": "store_true"}
            elif option.kind == "list":
                settings |= {"action": "append", "metavar": option.metavar}
            else:
                settings |= {"metavar": option.metavar}
            group.addoption(option.flag, **settings)
        kinds = {"flag": "bool", "list": "args", "text": "string"}
        parser.addini(option.dest, help=option.help, type=kinds[option.kind], default=None)  # type: ignore[arg-type]


def read(config: pytest.Config) -> Settings:
    """The session's settings.

    Raises:
        VramUsageError: a value cannot be used; the message names the option, the value and the valid ones.
    """
    values = {option.name: _value(config, option) for option in OPTIONS}
    base = config.rootpath
    baseline = None if values["baseline"] is None else _path(config, base, values["baseline"])
    if values["update_baseline"] and baseline is None:
        raise VramUsageError("--vram-update-baseline needs a file to update: add --vram-baseline=FILE")
    output = tuple(_path(config, base, text) for text in values["output"] or ())
    for path in output:
        if path.suffix not in SUFFIXES:
            raise VramUsageError(f"--vram-output={path}: the suffix says the format; choose {', '.join(SUFFIXES)}")
    return Settings(
        report=bool(values["report"]),
        output=output,
        gpu=parse_choice(values["gpu"] or "auto"),
        require=_choice("require", values["require"], REQUIRABLE),
        baseline=baseline,
        update_baseline=bool(values["update_baseline"]),
        tolerance_percent=_number("tolerance", values["tolerance"], 2.0, float),
        suggest=bool(values["suggest"]),
        top=int(_number("top", values["top"], 5, int)),
        max_bytes=(
            None
            if values["max_gb"] is None
            else limit_bytes("vram_max_gb", _number("max_gb", values["max_gb"], 0, float), unit=units.GIB)
        ),
        metric=_choice("metric", values["metric"], METRICS) or "allocated",
        on_unmeasured=_choice("on_unmeasured", values["on_unmeasured"], UNMEASURED) or "skip",
    )


def early_gpu(config: pytest.Config) -> str | None:
    """The ``gpu`` setting before the options are parsed for good; ``None`` when nobody chose."""
    value = getattr(config.known_args_namespace, "vram_gpu", None)
    return value if value is not None else config.getini("vram_gpu") or None


def asked_for(config: pytest.Config) -> bool:
    """Whether any setting was given: a session that gives none may still use the marker."""
    return any(_value(config, option) not in (None, [], "") for option in OPTIONS)


def _value(config: pytest.Config, option: Option) -> Any:
    if not option.ini_only:
        given = config.getoption(option.dest, None)
        if given not in (None, False):
            return given
    value = config.getini(option.dest)
    return None if value in ("", [], False) else value


def _path(config: pytest.Config, base: Path, text: str) -> Path:
    path = Path(text).expanduser()
    return path if path.is_absolute() else Path(config.invocation_params.dir) / path


def _choice(name: str, value: str | None, choices: tuple[str, ...]) -> str | None:
    if value is not None and value not in choices:
        raise VramUsageError(f"vram_{name} = {value!r}: choose {', '.join(choices)}")
    return value


def _number(name: str, value: str | None, default: float, kind: Callable[[str], float]) -> float:
    if value is None:
        return default
    try:
        number = kind(value)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise VramUsageError(f"vram_{name} = {value!r}: write a number, 0 or more")
    return number
