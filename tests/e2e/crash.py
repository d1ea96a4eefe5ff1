"""Runs finetune in forked children and kills them: imports once, so that a kill and its resumption cost a second.

    python crash.py FOLDER JSON    # JSON: {"base": [flags], "scenarios": {name: [flags]}, "kills": n, "seed": n}

For each scenario: one run undisturbed, in which the moments are counted at which the process touches its output folder,
starts a forward pass or changes the weights; then ``kills`` runs, each killed with SIGKILL at one of those moments, drawn
at random, then resumed, killed once more, and resumed to the end. Prints, as JSON, every adapter's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from finetune import cli, loop, prepare, qlora, result  # noqa: F401 - imported before the fork, to be paid for once

AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Moments:
    """Counts the moments at which a process may die, and dies at the one it is told."""

    def __init__(self, output: Path, die_at: int | None) -> None:
        self.count, self._output, self._die_at = 0, str(output), die_at

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        torch.nn.modules.module.register_module_forward_pre_hook(self._forward)
        step = torch.optim.Optimizer.step

        for cls in [torch.optim.Optimizer, *_subclasses(torch.optim.Optimizer)]:
            if "step" in vars(cls):
                step = cls.step
                cls.step = lambda self_, *args, _step=step, **kwargs: (self._tick(), _step(self_, *args, **kwargs))[1]  # type: ignore[method-assign]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and any(self._output in str(argument) for argument in arguments[:2]):
            self._tick()

    def _forward(self, module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            self._tick()

    def _tick(self) -> None:
        self.count += 1
        if self.count == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _subclasses(cls: type) -> list[type]:
    return [s for sub in cls.__subclasses__() for s in (sub, *_subclasses(sub))]


def run(output: Path, flags: list[str], die_at: int | None = None) -> tuple[int, int]:
    """Run in a child. Returns its exit code (negative: the signal that killed it) and the moments it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            moments = Moments(output, die_at)
            moments.arm()
            code = int(qlora.main([*flags, "--output", str(output)]))
            os.write(writer, str(moments.count).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def adapter_digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def must(output: Path, outcome: tuple[int, int], *allowed: int) -> int:
    code, counted = outcome
    if code not in allowed:
        raise SystemExit(f"{output}: exit code {code}\n{output.with_suffix('.log').read_text()[-4000:]}")
    return counted if code == 0 else 0


def main(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    rng = random.Random(plan["seed"])
    found: dict[str, Any] = {}
    for name, extra in plan["scenarios"].items():
        flags = [*plan["base"], *extra]
        straight = folder / name
        total = must(straight, run(straight, flags), 0)
        outcome: dict[str, Any] = {"straight": adapter_digest(straight), "moments": total, "killed": []}
        for number in range(plan["kills"]):
            output = folder / f"{name}-{number}"
            first, second = rng.randint(1, total), rng.randint(1, total)
            must(output, run(output, flags, first), -signal.SIGKILL)
            must(output, run(output, [*flags, "--resume"], second), -signal.SIGKILL, 0)
            must(output, run(output, [*flags, "--resume"]), 0)
            steps = [json.loads(line)["step"] for line in (output / "train.jsonl").read_text().splitlines()]
            outcome["killed"].append({"moments": [first, second], "adapter": adapter_digest(output), "steps": steps})
        found[name] = outcome
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
