"""A git repository with a project whose memory is made up, for tests of histories and of CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MADE_UP = (Path(__file__).parent / "made_up_device.py").read_text()
CONFTEST = "import made_up_device\n\n\ndef pytest_vram_probe(config):\n    return made_up_device.PROBE\n"
PYTHON_PATH = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "GIT_", "PYTEST_"))},
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "COLUMNS": "120",
    # A file that changes twice in a second and keeps its size would be taken from its old bytecode.
    "PYTHONDONTWRITEBYTECODE": "1",
    **{
        f"GIT_{who}_{what}": f"Ann{end}"
        for who in ("AUTHOR", "COMMITTER")
        for what, end in (("NAME", ""), ("EMAIL", "@x"))
    },
}


class Repository:
    """One test, ``test_it.py::test_step``, which allocates what the last commit says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")
        self.write("made_up_device.py", MADE_UP)
        self.write("conftest.py", CONFTEST)
        self.write(".gitignore", "__pycache__\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def needs(self, megabytes: int, *, budget: int = 900) -> None:
        """Change the test to allocate this much."""
        self.write(
            "model.py", f"from made_up_device import MB, alloc\n\n\ndef step():\n    return alloc({megabytes} * MB)\n"
        )
        test = (
            f"import model\nimport pytest\n\n\n@pytest.mark.vram(max_mb={budget})\ndef test_step():\n    model.step()\n"
        )
        self.write("test_it.py", test)

    def commit(self, message: str, megabytes: int | None = None) -> str:
        if megabytes is not None:
            self.needs(megabytes)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run ``python -m`` with these arguments; the two streams together."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env=ENVIRONMENT | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def pytest(self, *arguments: str) -> str:
        return self.run("pytest", "-p", "vram", "-p", "no:cacheprovider", *arguments).stdout

    def vram(self, *arguments: str, code: int = 0, **variables: str) -> str:
        done = self.run("pytest_vram", *arguments, **variables)
        assert done.returncode == code, done.stdout
        return done.stdout
