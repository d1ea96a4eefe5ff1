"""What the plugin costs: installed and unused, per marked test, and on a real training step traced on the CPU.

    python benchmarks/plugin_overhead.py [unused marked recorded host]

Each figure is the median of several fresh processes or of many tests. Sessions are compared by their processor time,
which other programs on the machine disturb less than the time on the clock.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = 1_000
RUNS = 11

# With compiled modules kept, as they are wherever a package is installed.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": ".",
}

UNUSED = f"import pytest\n@pytest.mark.parametrize('i', range({TESTS}))\ndef test_it(i): pass\n"

PLUGIN = """
import time, statistics, pytest

times = []

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        times.append(time.perf_counter() - start)

def pytest_unconfigure():
    if times:
        print(f"\\nMEDIAN {statistics.median(times) * 1e6:.1f}")
"""

CUDA_TEST = """
import pytest, torch

BLOCKS = [torch.empty(1000, device="cuda") for _ in range({blocks})]

@pytest.mark.parametrize("i", range({tests}))
{mark}
def test_it(i): pass
"""

STEP_TEST = """
import time, statistics, pytest, torch
from torch import nn

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    return nn.TransformerEncoder(layer, 4).to({device!r})

{mark}
def test_step(model):
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, 128, 256).to({device!r})
    times = []
    for _ in range({steps}):
        start = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(f"\\nMEDIAN {{statistics.median(times[2:]) * 1e6:.1f}}")
"""


def run(folder: Path, *arguments: str) -> tuple[float, str]:
    """Processor seconds and output of a pytest run with no plugin but those named."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def median_us(folder: Path, *arguments: str) -> float:
    """The figure that the session prints, median over three runs."""
    found = []
    for _ in range(3):
        match = re.search(r"MEDIAN ([\d.]+)", run(folder, *arguments)[1])
        assert match is not None
        found.append(float(match[1]))
    return statistics.median(found)


def unused(folder: Path) -> None:
    """Sessions with and without the plugin, in turn, so that both see the same machine."""
    (folder / "test_unused.py").write_text(UNUSED)
    (folder / "empty.py").write_text("")  # any plugin costs pytest some time, this one included
    without, with_it = [], []
    for _ in range(RUNS):
        without.append(run(folder, "-p", "empty", "test_unused.py")[0])
        # By module: by the name of its entry point, pytest would first read the metadata of all that is installed.
        with_it.append(run(folder, "-p", "pytest_vram.plugin", "test_unused.py")[0])
    differences = [b - a for a, b in zip(without, with_it, strict=True)]
    print(
        f"unused, {TESTS:,} tests: {statistics.median(without):.3f} s with an empty plugin,"
        f" {statistics.median(with_it):.3f} s with this one;"
        f" median of the differences"
        f" {statistics.median(differences) * 1000:+.1f} ms, smallest times"
        f" {(min(with_it) - min(without)) * 1000:+.1f} ms"
    )
    code = "import time, pytest; m = time.process_time();"
    code += " import pytest_vram.plugin, pytest_vram.plugin.options, pytest_vram.plugin.activation;"
    code += " import pytest_vram.plugin.hookspecs; print((time.process_time() - m) * 1000)"
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
            ).stdout
        )
        for _ in range(RUNS)
    ]
    print(f"importing the plugin after pytest: {statistics.median(times):.2f} ms")


def marked(folder: Path) -> None:
    """An empty test on a dry GPU: the ``cuda`` probe, whose counters are torch's own."""
    (folder / "timing.py").write_text(PLUGIN)
    gpu = ("-p", "vram", "-p", "timing", "--vram-gpu=dry:rtx-4080")
    for blocks in (1, 1000):
        found = {}
        for name, mark in (("unmarked", ""), ("marked", "@pytest.mark.vram(max_gb=1)")):
            (folder / "test_marked.py").write_text(CUDA_TEST.format(mark=mark, tests=TESTS, blocks=blocks))
            found[name] = median_us(folder, *gpu, "test_marked.py")
        print(
            f"empty test, {blocks:,} live tensors: {found['unmarked']:.0f} us unmarked, {found['marked']:.0f} us with"
            f" a budget: {found['marked'] - found['unmarked']:.0f} us a marked test"
        )


def steps(folder: Path, device: str, gpu: str, steps: int) -> None:
    """A real training step with and without a budget."""
    found = {}
    for name, mark in (("plain", ""), ("budget", "@pytest.mark.vram(max_gb=100)")):
        (folder / "test_step.py").write_text(STEP_TEST.format(device=device, mark=mark, steps=steps))
        found[name] = median_us(folder, "-p", "vram", f"--vram-gpu={gpu}", "test_step.py")
    print(
        f"training step on {gpu}: {found['plain'] / 1000:.2f} ms plain, {found['budget'] / 1000:.2f} ms with a"
        f" budget: {found['budget'] / found['plain']:.2f}x"
    )


def main() -> None:
    """Measure what is asked for, all of it by default."""
    chosen = sys.argv[1:] or ["unused", "marked", "recorded", "host"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "unused" in chosen:
            unused(folder)
        if "marked" in chosen:
            marked(folder)
        if "recorded" in chosen:
            steps(folder, "cuda", "dry:rtx-4080", 100)
        if "host" in chosen:
            steps(folder, "cpu", "host", 12)


if __name__ == "__main__":
    main()
