"""The process behind ``--dry-run``, ``--fit`` and the ladder: a request in, what the steps needed out.

Started as ``python -m finetune.dryrun.trial_process REQUEST.json RESULT.json``, with a dry GPU beneath torch or on a
real one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.trial import Bench


def main(request_file: Path, result_file: Path) -> None:
    """Run what the request asks for, and write the results, one for each."""
    request = json.loads(request_file.read_text())
    config = yaml_file.replace(RunConfig(), from_plain(request["config"]))
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        results = _answer(request, config, Path(folder))
    result_file.write_text(json.dumps(results))


def from_plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON keeps them, back in their own types."""
    types = yaml_file.field_types()
    return {
        name: tuple(value) if isinstance(value, list) else Path(value) if types[name][1] is Path else value
        for name, value in settings.items()
    }


def _answer(request: dict[str, Any], config: RunConfig, folder: Path) -> Any:
    over_time = None
    if request.get("over_time"):
        from finetune.dryrun.over_time import OverTime

        over_time = OverTime()
    bench = Bench(config, folder, over_time)
    if bench.refused is not None:
        return [dataclasses.asdict(bench.refused)]
    if request["kind"] == "fit":
        from finetune.dryrun.search import search

        return search(bench, config, open_settings=request["open"], limit_bytes=request["limit_bytes"])
    changes = [yaml_file.replace(config, from_plain(change)) for change in request["changes"]]
    return [dataclasses.asdict(bench.run(changed)) for changed in changes]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
