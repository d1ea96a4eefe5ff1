"""The process behind ``--dry-run``, ``--fit`` and the ladder: it reads a request, takes the steps, writes the result.

It is started as ``python -m finetune.dryrun.trial_process REQUEST.json RESULT.json``, on a dry GPU or on a real one.
With several ranks there is such a process for each, and each writes a result of its own.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.messages import Refusal, Request, Result, Settings
from finetune.dryrun.rank_bench import RankBench
from finetune.dryrun.trial import Bench
from finetune.dryrun.trial_data import check_rows
from finetune.errors import (
    ConfigError,
    DataError,
    ExitCode,
    FinetuneError,
    MissingModelError,
    OtherRankError,
    RankLostError,
)
from finetune.model.settle import settled
from finetune.training import ranks
from pytest_vram.memory.codec import decode, encode


def main(request_file: Path, result_file: Path) -> None:
    """Carry out the request, and write the :class:`Result`: the measurements, or the reason why there are none."""
    request = decode(Request, json.loads(request_file.read_text()))
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        try:
            config = settled(yaml_file.replace(RunConfig(), from_plain(request.settings)))
            with ranks.joined(config):
                result = _answer(request, config, Path(folder))
                result_file.write_text(json.dumps(encode(result)))
                if request.ranks > 1 and not all(trial.fits for trial in result.trials):
                    raise _EndAllRanks
        except (_EndAllRanks, OtherRankError):  # the result of the rank that was first says why
            return
        except RankLostError as error:  # the command that started the ranks says how that one ended
            print(error, file=sys.stderr)
            sys.exit(ExitCode.RANK_LOST)
        except FinetuneError as error:
            result_file.write_text(json.dumps(encode(Result(refusal=refusal(error)))))


class _EndAllRanks(FinetuneError):
    """Memory ran out in this rank, which the others would wait for."""

    exit_code = ExitCode.OUT_OF_MEMORY


def refusal(error: FinetuneError) -> Refusal:
    """Convert an error to a message that can be sent to the other process."""
    if isinstance(error, ConfigError):
        problems = tuple(dataclasses.replace(p, value=_as_json(p.value)) for p in error.problems)
        return Refusal(kind="setting", message=str(error), problems=problems)
    if isinstance(error, MissingModelError):
        return Refusal(kind="missing", message=str(error))
    return Refusal(kind="data" if isinstance(error, DataError) else "model", message=str(error))


def _as_json(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def from_plain(settings: Settings) -> Settings:
    """Convert settings from JSON back to their own types: lists to tuples, text to paths."""
    types = yaml_file.field_types()
    return {
        name: tuple(value) if isinstance(value, list) else Path(value) if types[name][1] is Path else value
        for name, value in settings.items()
    }


def _answer(request: Request, config: RunConfig, folder: Path) -> Result:
    recorder = None
    if request.over_time:
        from finetune.dryrun.recording import TrialRecorder

        recorder = TrialRecorder()
    several = request.ranks > 1 and request.kind == "search"
    bench = (RankBench if several else Bench)(config, folder, recorder)
    if bench.refused is not None:
        return Result(trials=(bench.refused,))
    check_rows(config, bench.base)
    if request.kind == "search":
        from finetune.dryrun.search import search

        opened, limit = request.open_settings, request.limit_bytes
        return Result(found=search(bench, config, open_settings=opened, limit_bytes=limit, ranks=request.ranks))
    changed = [yaml_file.replace(config, from_plain(change)) for change in request.changes]
    run = bench.run_chosen if request.choose else bench.run
    return Result(trials=tuple(run(variant) for variant in changed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
