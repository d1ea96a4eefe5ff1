"""How the program of a dry run is found and started."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vram import cli
from pytest_vram.commands import run as command

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = f"""#!{sys.executable}
import json, os, shutil, sys
json.dump([shutil.which("helper"), os.environ.get("PATH")], open(sys.argv[1], "w"))
"""


@pytest.fixture
def environment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands of an environment that is not activated: its folder is not on PATH."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    for name in ("tool", "helper"):
        (folder / name).write_text(SCRIPT)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


@pytest.mark.parametrize("path", ["/usr/bin:/bin", ""])
def test_a_command_of_the_environment_finds_the_others(environment_of_its_own: Path, path: str) -> None:
    folder = environment_of_its_own
    program = command._program(["tool", "x"])
    assert program[0] == str(folder / "tool")
    found = command._path(program, path).split(os.pathsep)
    assert found[0] == str(folder)
    assert found[1:] == [part for part in path.split(":") if part], "an empty part would be the current folder"


def test_other_programs_and_an_activated_environment_keep_their_path(environment_of_its_own: Path) -> None:
    folder = environment_of_its_own
    assert command._path(["/usr/bin/env", "x"], "/usr/bin") == "/usr/bin"
    assert command._path(command._program(["-c", "pass"]), "/usr/bin") == "/usr/bin"
    assert command._path([str(folder / "tool")], f"/usr/bin:{folder}") == f"/usr/bin:{folder}"


def test_the_program_gets_it(environment_of_its_own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "environment", lambda *_, **__: dict(os.environ))
    command.run(["tool", str(tmp_path / "out.json")], gpu="l4")
    helper, path = json.loads((tmp_path / "out.json").read_text())
    assert helper == str(environment_of_its_own / "helper")
    assert path == os.pathsep.join([str(environment_of_its_own), os.environ["PATH"]])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--json", "{file}/x.json"], "--json {file}/x.json cannot be written: "),
        (["--snapshot", "{file}/x.pickle"], "--snapshot {file}/x.pickle cannot be written: "),
        (["--html", "{file}/x.html"], "--html {file}/x.html cannot be written: "),
        (["--html", "{folder}/x.txt"], "--html {folder}/x.txt: the name of a page ends in .html"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_program_runs(
    options: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    places = {"file": str(tmp_path / "file"), "folder": str(tmp_path)}
    program = f"open({str(tmp_path / 'ran')!r}, 'w')"
    asked = [option.format(**places) for option in options]
    assert cli.main(["run", "--gpu", "l4", *asked, "--", "-c", program]) == 2
    assert why.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", ["-4", "0", "nan", "inf"])
def test_a_card_has_some_memory(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--gpu", "l4", f"--total-gb={number}", "--", "x.py"])
    assert f"'{number}': write a number of GiB above 0" in capsys.readouterr().err
