"""Runs one case and writes its marks as JSON: ``python program.py CASE OUT.json``, on a real card or a dry one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    name, out = sys.argv[1], Path(sys.argv[2])
    import language  # noqa: F401 - registers its cases
    import layers  # noqa: F401 - registers its cases
    from marks import CASES, Marks

    from pytest_vram.drygpu import driver

    marks = Marks()
    CASES[name].run(marks)
    notes = driver.notes() if driver.is_active() else ()
    out.write_text(json.dumps({**marks.as_json(), "notes": notes}))


if __name__ == "__main__":
    main()
