"""Reads the session's settings once, from the options and the ini file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram import units
from pytest_vram.errors import VramUsageError
from pytest_vram.plugin.markers import METRICS, limit_bytes
from pytest_vram.plugin.options import OPTIONS, value
from pytest_vram.probe.select import Choice, parse_choice
from pytest_vram.report.disk import refuse_unwritable
from pytest_vram.report.files import suffix_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

UNMEASURED = ("skip", "fail", "warn")
REQUIRABLE = ("cuda", "dry", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a session."""

    report: bool
    output: tuple[Path, ...]
    history: Path | None
    timeline: bool
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
        """Whether tests without a marker are also measured."""
        asked = (self.report, self.output, self.history, self.timeline, self.baseline, self.suggest, self.max_bytes)
        return any(asked)


def read(config: pytest.Config) -> Settings:
    """Return the session's settings.

    Raises:
        VramUsageError: if a value cannot be used; the message names the option, the value and the valid values.
    """
    values = {option.name: value(config, option) for option in OPTIONS}
    baseline = None if values["baseline"] is None else _path(config, values["baseline"])
    if values["update_baseline"] and baseline is None:
        raise VramUsageError("--vram-update-baseline needs a file to update: add --vram-baseline=FILE")
    output = tuple(_path(config, text) for text in values["output"] or ())
    for path in output:
        try:
            suffix_of(path)
        except VramUsageError as error:
            raise VramUsageError(f"--vram-output={error}") from error
        refuse_unwritable(path, "--vram-output")
    history = None if values["history"] is None else _path(config, values["history"])
    if history is not None and history.exists() and not history.is_dir():
        raise VramUsageError(f"--vram-history={history}: this is a file; name a folder, which need not exist")
    return Settings(
        report=bool(values["report"]),
        output=output,
        history=history,
        timeline=bool(values["timeline"]) or any(path.suffix == ".html" for path in output),
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


def _path(config: pytest.Config, text: str) -> Path:
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
