"""``python -m pytest_vram run`` runs a program as it would run by itself, and says what memory it needed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.drygpu import find_card

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., subprocess.CompletedProcess[str]]

MIB = 1 << 20

USES_GPU = """
import sys, torch
kept = torch.empty({mib} << 20, dtype=torch.uint8, device="cuda")
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "train.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_figures_and_json(run_command: Run, script: Callable[..., str], tmp_path: Path) -> None:
    out, snapshot = tmp_path / "out.json", tmp_path / "out.pickle"
    text = USES_GPU.format(mib=512) + (
        "del kept\n"
        "torch.cuda.reset_peak_memory_stats()\n"
        "torch.cuda.reset_accumulated_memory_stats()\n"
        "print(torch.arange(4, device='cuda').sum().item(), torch.ones(4, device='cuda').softmax(0).sum().item())\n"
        "print(sys.argv[1:], __name__, sys.path[0])\n"
    )
    where = script(text)
    done = run_command(
        "--gpu", "L4", "--json", str(out), "--snapshot", str(snapshot), "--", where, "--lr", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["6 0.0", f"['--lr', '1', '--json'] __main__ {tmp_path}"]
    report = json.loads(out.read_text())
    assert report["gpu"] == "l4"
    assert report["kind"] == "dry"
    assert report["peak_allocated_bytes"] == 512 * MIB, "the program's own reset made the peak forgotten"
    assert report["peak_reserved_bytes"] == 514 * MIB
    assert report["peak_device_bytes"] == report["peak_reserved_bytes"] + find_card("l4").context_bytes
    assert report["total_bytes"] == find_card("l4").total_bytes
    assert (report["managed_bytes"], report["num_alloc_retries"], report["num_ooms"]) == (0, 0, 0)
    assert report["exit_code"] == 0
    assert report["fits"] is True
    assert report["versions"]["torch"]
    reads = {(read["operation"], read["answered"]): read["location"] for read in report["host_reads"]}
    assert reads["item", False].endswith("train.py:7")
    assert reads["item", True].endswith("train.py:7")
    traced = pickle.loads(snapshot.read_bytes())["device_traces"][0]
    assert any(entry["size"] == 512 * MIB for entry in traced)
    for expected in (
        "peak allocated     512 MiB",
        "peak reserved      514 MiB",
        "fits 22.0 GiB",
        "train.py:7: computed on the",
    ):
        assert expected in done.stderr


def test_out_of_memory_is_said_and_ends_the_program_as_ever(
    run_command: Run, script: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    done = run_command("--gpu", "rtx-4060", "--json", str(out), "--", script(USES_GPU.format(mib=9 * 1024)))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "DID NOT FIT: 1 out-of-memory error" in done.stderr
    report = json.loads(out.read_text())
    assert report["fits"] is False
    assert report["num_ooms"] == 1
    assert "Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 7.75 GiB" in report["out_of_memory"]


def test_nccls_buffers_that_do_not_fit_are_a_refusal(
    run_command: Run, script: Callable[..., str], tmp_path: Path
) -> None:
    """Eight channels of 12 MiB on a card with 64 MiB beside the context."""
    out = tmp_path / "out.json"
    text = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=2)\n"
        "dist.all_reduce(torch.ones(4, device='cuda'))\n"
    )
    total = str((find_card("l4").context_bytes + 64 * MIB) / 1024**3)
    done = run_command(
        "--gpu", "l4", "--total-gb", total, "--json", str(out), "--", script(text), NCCL_MIN_NCHANNELS="8"
    )
    assert done.returncode == 1
    assert "no room for the buffers of NCCL's connections" in done.stderr
    assert "DID NOT FIT: 1 out-of-memory error" in done.stderr
    report = json.loads(out.read_text())
    assert (report["fits"], report["num_ooms"], report["devices"][0]["nccl_bytes"]) == (False, 1, 0)


def test_total_and_settings_and_count(run_command: Run, script: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    text = (
        "import torch\n"
        "first = torch.empty(64 << 20, dtype=torch.uint8, device='cuda:0')\n"
        "second = torch.empty(96 << 20, dtype=torch.uint8, device='cuda:1')\n"
        "print(torch.cuda.device_count(), torch.cuda.mem_get_info(1)[1] >> 30)\n"
    )
    settings = ("--count", "2", "--total-gb", "3", "--alloc-conf", "expandable_segments:True")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # as on runners that want to be sure
    done = run_command("--gpu", "l4", *settings, "--json", str(out), "--", script(text), **hidden)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "3"]
    report = json.loads(out.read_text())
    assert [device["peak_allocated_bytes"] for device in report["devices"]] == [64 * MIB, 96 * MIB]
    assert report["peak_allocated_bytes"] == 96 * MIB
    assert report["alloc_conf"] == "expandable_segments:True"
    assert "GPU 1" in done.stderr


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(7)", 7), ("sys.exit()", 0), ("sys.exit('no data')", 1), ("raise KeyError('x')", 1), ("os._exit(5)", 5)],
)
def test_exit_codes(run_command: Run, script: Callable[..., str], ending: str, code: int) -> None:
    done = run_command("--gpu", "l4", "--", script(f"import os, sys\n{ending}\n"))
    assert done.returncode == code
    assert "no process used the GPU" in done.stderr
    assert f"exit code {code}" in done.stderr


def test_a_module_and_its_arguments(run_command: Run) -> None:
    done = run_command("--gpu", "l4", "--", "-m", "json.tool", "--help")
    assert done.returncode == 0
    assert "json" in done.stdout


def test_an_interrupt_reaches_the_program_and_its_figures_survive(script: Callable[..., str]) -> None:
    text = USES_GPU.format(mib=64) + (
        "import time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saved', flush=True)\n    raise\n"
    )
    command = [sys.executable, "-m", "pytest_vram", "run", "--gpu", "l4", "--", script(text)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ.copy(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert output == "saved\n"
    assert "KeyboardInterrupt" in errors
    assert "peak allocated     64.0 MiB" in errors
    assert process.returncode == 128 + signal.SIGINT


CHILDREN = """
import sys, torch, torch.multiprocessing
def work(index, together):
    kept = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    assert kept.sum().item() == 0
    together.wait()
if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (torch.multiprocessing.get_context("spawn").Barrier(2),), nprocs=2)
"""


def test_child_processes_count(run_command: Run, script: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_command("--gpu", "l4", "--json", str(out), "--", script(CHILDREN))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["devices"][0]["processes"] == 2
    assert report["peak_allocated_bytes"] >= 64 * MIB
    assert "2 processes: an upper bound: the peaks of processes that lived at the same time are added" in done.stderr


RANKS = """
import os, torch, torch.distributed as distributed
from torch.distributed.fsdp import fully_shard
distributed.init_process_group("nccl")
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
layer = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1024, 1024).cuda())
layer(torch.randn(8, 1024, device="cuda")).sum().backward()
rows = torch.tensor([4], device="cuda")
distributed.all_reduce(rows)
assert rows.item() == 8, rows
net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
for part in (*net, net):
    fully_shard(part)
net(torch.randn(8, 1024, device="cuda")).sum().backward()
distributed.barrier()
distributed.destroy_process_group()
"""


def test_ranks_of_torchrun_have_a_card_each(run_command: Run, script: Callable[..., str], tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP compare parameters across ranks, which tell each other."""
    out = tmp_path / "out.json"
    launch = ("torchrun", "--standalone", "--nproc-per-node", "2")
    done = run_command("--gpu", "l4", "--count", "2", "--json", str(out), "--", *launch, script(RANKS))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [device["processes"] for device in report["devices"]] == [1, 1]
    assert all(device["peak_allocated_bytes"] > 16 * MIB for device in report["devices"])
    assert "other ranks taken as this one" not in {read["note"] for read in report["host_reads"]}


WORKERS = """
import torch
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.tensor([index])
loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, pin_memory=True)
print(sum(batch.cuda(non_blocking=True).sum().item() for batch in loader))
"""


def test_data_loader_workers_and_pinned_batches(run_command: Run, script: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_command("--gpu", "l4", "--json", str(out), "--", script(WORKERS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "28"
    assert json.loads(out.read_text())["devices"][0]["processes"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "rtx-4081", "--", "x.py"), "did you mean rtx-4080"),
        (("--gpu", "l4", "--", "nowhere.py"), "there is no file 'nowhere.py'"),
        (("--gpu", "l4"), "there is nothing to run"),
        (("--gpu", "l4", "--", "-m"), "-m needs the name of a module"),
        (("--gpu", "l4", "--count", "0", "--", "-c", "pass"), "count=0"),
        (("--gpu", "l4", "--", "no-such-command"), "neither a Python script, nor -m and a module, nor a command"),
    ],
)
def test_wrong_use_is_explained(run_command: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run_command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_program_may_have_a_sitecustomize_of_its_own(
    run_command: Run, script: Callable[..., str], tmp_path: Path
) -> None:
    script("import builtins\nbuiltins.from_site = 'kept'\n", "sitecustomize.py")
    done = run_command("--gpu", "l4", "--", script("print(from_site)\n"), PYTHONPATH=str(tmp_path))
    assert done.stdout == "kept\n"


def test_doctor_and_cards(capsys: pytest.CaptureFixture[str]) -> None:
    from pytest_vram.cli import main

    began = time.monotonic()
    assert main(["doctor", "--json"]) == 0
    findings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {"probe cuda", "probe dry", "probe nvml", "probe host"} <= {finding["subject"] for finding in findings}
    assert time.monotonic() - began < 300
    assert main(["cards", "l4"]) == 0
    assert "NVIDIA L4" in capsys.readouterr().out
    assert main(["cards", "l5"]) == 2
