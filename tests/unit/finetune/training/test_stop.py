"""The first signal stops a run where nothing is half done, the second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from finetune.errors import ExitCode
from finetune.training.stop import Stop, StopRequested


def test_with_nothing_to_save_a_signal_stops_where_it_lands() -> None:
    with pytest.raises(StopRequested), Stop().listening():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_loop_a_signal_waits_for_the_next_micro_batch(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(2, 2)
    stop = Stop()
    with stop.listening(), stop.deferred(model):
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(StopRequested):
            model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert "Once more stops at once" in capsys.readouterr().err


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal, torch\nfrom finetune.training.stop import Stop\n"
        "stop = Stop()\n"
        "with stop.listening(), stop.deferred(torch.nn.Identity()):\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INTERRUPTED
    assert done.stdout == ""


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop().listening():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_signals_are_left_alone() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with Stop().listening():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
