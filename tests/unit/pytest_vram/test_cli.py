from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vram import cli
from pytest_vram.memory import Device, Environment, Measurement, Peak, Report, TestRecord
from pytest_vram.report import files
from pytest_vram.units import MIB

if TYPE_CHECKING:
    from pathlib import Path

CARD = Device(kind="dry", index=0, name="a card")


def write(path: Path, outcome: str = "passed", **sizes: int) -> str:
    tests = tuple(
        TestRecord(nodeid=n, outcome=outcome, measurements=(Measurement(device=CARD, peak=Peak(allocated_bytes=size)),))
        for n, size in sizes.items()
    )
    files.save(Report(environment=Environment(python="3", pytest_vram="0", devices=(CARD,)), tests=tests), path)
    return str(path)


def test_compare_lists_what_grew_shrank_is_new_and_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", same=MIB, grows=MIB, shrinks=MIB, goes=MIB)
    b = write(tmp_path / "b.json", same=MIB, grows=2 * MIB, shrinks=MIB // 2, comes=MIB)
    assert cli.main(["compare", a, b]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "grew:",
        "    +100.0%   1.00 MiB -> 2.00 MiB   grows",
        "shrank:",
        "     -50.0%   1.00 MiB -> 512 KiB    shrinks",
        "new:",
        "  comes",
        "gone:",
        "  goes",
    ]


def test_compare_passes_growth_within_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.json", t=100 * MIB), write(tmp_path / "b.json", t=104 * MIB)
    assert cli.main(["compare", a, b]) == 1
    assert cli.main(["compare", a, b, "--tolerance", "5"]) == 0
    assert "no peak changed by more than 5%" in capsys.readouterr().out


def test_compare_shows_a_test_that_now_breaks_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.json", t=MIB), write(tmp_path / "b.json", "failed", t=9 * MIB)
    assert cli.main(["compare", a, b]) == 1
    assert "+800.0%" in capsys.readouterr().out


def test_report_shows_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", t=MIB)
    assert cli.main(["report", a]) == 0
    assert "1.00 MiB t" in capsys.readouterr().out
    assert cli.main(["report", a, "-o", str(tmp_path / "a.md"), "-o", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.md").read_text().startswith("## GPU memory")
    assert (tmp_path / "a.csv").read_text().startswith("nodeid,")


@pytest.mark.parametrize("arguments", [["report", "none.json"], ["compare", "none.json", "none.json"]])
def test_what_cannot_be_read_is_said_without_a_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert "none.json is not there" in capsys.readouterr().err


def test_an_unknown_suffix_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", write(tmp_path / "a.json", t=1), "-o", str(tmp_path / "a.xls")]) == 2
    assert "choose .json" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from pytest_vram import cli\ntry: cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("run", "report", "compare", "cards", "doctor"):
        assert command in done.stdout
