"""A server that runs ``finetune.qlora`` in forked children: what is imported once need not be imported for every run.

Reads one JSON request a line: {"flags": [...], "output": path, "fault": {...} or null}. Answers one JSON line: {"code":
exit code, or minus the signal; "out", "err": what was printed; "moments": how many were counted}. A *moment* is one at
which the process touches its output folder, starts a forward pass, or changes the weights. Faults, each at ``at``:

    {"kind": "signal", "at": n, "signals": [2]}     the process gets these signals, one at a time
    {"kind": "full", "at": n}                        from then on every file opened for writing fails: no space left
    {"kind": "memory", "at": n, "of": "torch"}       more is asked of torch (or of "python") than any machine has
    {"kind": "without", "at": 0, "of": "_try_longest"}     the loop runs without this part

With "ranks": n the request is run in n children, as a launcher would start them, and the answer has a list: one outcome
for each rank. A fault with "rank": r meets that rank only.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from typing import Any

import torch

# Imported before the fork, so that each child does not pay for it again.
from finetune import qlora
from finetune.training import loop, prepare, result  # noqa: F401 - imported before the fork, for all children
from pytest_vram.launcher import places

AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Moments:
    """Counts the moments of a process, and does to it what is asked at the one that is asked."""

    def __init__(self, output: str, fault: dict[str, Any]) -> None:
        self.count, self._output, self._fault = 0, output, fault

    def arm(self) -> None:
        if self._fault.get("kind") == "without":
            setattr(loop._Loop, self._fault["of"], lambda _: None)
        sys.addaudithook(self._audit)
        torch.nn.modules.module.register_module_forward_pre_hook(self._forward)
        for cls in _subclasses(torch.optim.Optimizer):
            if "step" in vars(cls):
                cls.step = self._counted(cls.step)  # type: ignore[attr-defined]  # the class is found by name

    def _counted(self, step: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            return step(*args, **kwargs)

        return counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and any(self._output in str(argument) for argument in arguments[:2]):
            self._tick()
            full = self._fault.get("kind") == "full" and self.count >= self._fault["at"]
            if full and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _forward(self, module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            self._tick()

    def _tick(self) -> None:
        self.count += 1
        if self.count != self._fault.get("at"):
            return
        if self._fault["kind"] == "signal":
            for number in self._fault["signals"]:
                os.kill(os.getpid(), number)
        elif self._fault["kind"] == "memory":
            _ = torch.empty(2**50) if self._fault["of"] == "torch" else bytearray(2**60)


def _subclasses(cls: type) -> list[type]:
    return [s for sub in cls.__subclasses__() for s in (sub, *_subclasses(sub))]


def child(request: dict[str, Any], streams: list[int], report: int) -> None:
    code = 99
    try:
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
        moments = Moments(request["output"], request["fault"] or {})
        moments.arm()
        code = int(qlora.main(request["flags"]))
        os.write(report, str(moments.count).encode())
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Running:
    """One child, from its start to its outcome."""

    def __init__(self, request: dict[str, Any], environment: dict[str, str]) -> None:
        self.reader, writer = os.pipe()
        self.out, self.err = (os.fdopen(os.memfd_create(name), "w+b") for name in ("out", "err"))
        self.number = os.fork()
        if self.number == 0:
            os.environ.update(environment)
            child(request, [self.out.fileno(), self.err.fileno()], writer)
        os.close(writer)

    def outcome(self) -> dict[str, Any]:
        with os.fdopen(self.reader) as pipe:
            counted = pipe.read()
        _, status = os.waitpid(self.number, 0)
        said = []
        for stream in (self.out, self.err):
            stream.seek(0)
            said.append(stream.read().decode())
            stream.close()
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": said[0],
            "err": said[1],
            "moments": int(counted or 0),
        }


def serve(request: dict[str, Any]) -> Any:
    count, fault = request.get("ranks", 0), request["fault"] or {}
    if not count:
        return Running(request, {}).outcome()
    running = []
    for rank, environment in enumerate(places(count)):
        met = fault if fault.get("rank", rank) == rank else None
        running.append(Running(request | {"fault": met}, environment))
    return [one.outcome() for one in running]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
