"""Runs one case and writes its marks as JSON: ``python program.py CASE OUT.json``, on a real card or a dry one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    import language  # noqa: F401 - registers its cases
    import layers  # noqa: F401 - registers its cases
    from marks import CASES, Marks

    from pytest_vram.drygpu import notes

    marks = Marks()
    CASES[name].run(marks)
    out.write_text(json.dumps({**marks.as_json(), "notes": [asdict(note) for note in notes.so_far()]}))


if __name__ == "__main__":
    main()
