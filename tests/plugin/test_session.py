"""Options, unmeasured budgets, reports, baselines and many workers."""

from __future__ import annotations

import json

import pytest

TWO_TESTS = """
    @pytest.mark.vram(max_mb=4)
    def test_fits():
        free(alloc(3 * MB))

    @pytest.mark.vram(max_mb=1)
    def test_over():
        free(alloc(2 * MB))
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vram-gpu=tpu"], "*vram_gpu = 'tpu': choose auto, cuda, dry, dry:CARD, dry:CARDx2*"),
        (["--vram-gpu=dry:rtx-4800"], "*rtx-4800*rtx-4080*"),
        (["--vram-require=gpu"], "*vram_require = 'gpu': choose cuda, dry, host*"),
        (["--vram-output=report.pdf"], "*report.pdf: the suffix says the format; choose .json, .md, .csv, .html*"),
        (["--vram-tolerance=much", "--vram-report"], "*vram_tolerance = 'much': write a number*"),
        (["--vram-update-baseline"], "*needs a file to update: add --vram-baseline=FILE*"),
        (["--vram-require=dry"], "*--vram-require=dry: figures of this session would be of the kind 'cuda'*"),
        (
            ["-o", "vram_on_unmeasured=ignore", "--vram-report"],
            "*vram_on_unmeasured = 'ignore': choose skip, fail, warn*",
        ),
    ],
)
def test_a_wrong_setting_is_told_at_the_start(project, arguments: list[str], said: str) -> None:
    project.write(TWO_TESTS)
    result = project.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([said])


def test_ini_twins_do_what_the_options_do_and_lose_against_them(project) -> None:
    project.ini("vram_report = true", "vram_output = from_ini.json", "vram_top = 1")
    project.write(TWO_TESTS)
    project.run().stdout.fnmatch_lines(["*GPU memory*", "*2.00 MiB*1.00 MiB*200%*test_over*"])
    assert (project.pytester.path / "from_ini.json").exists()
    project.run("--vram-output=from_cli.json")
    assert (project.pytester.path / "from_cli.json").exists()


def test_switched_off_is_unmeasured_and_never_a_pass(project) -> None:
    project.pytester.makeconftest("")
    project.write(TWO_TESTS)
    result = project.run("--vram-gpu=off", "-rs")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*SKIPPED*budget not measured: measuring is switched off*"])
    result = project.run("--vram-gpu=off", "-o", "vram_on_unmeasured=fail")
    result.assert_outcomes(errors=2)
    result = project.run("--vram-gpu=off", "-o", "vram_on_unmeasured=warn")
    result.assert_outcomes(passed=2, warnings=2)


def test_a_budget_that_touched_nothing_is_flagged(project) -> None:
    project.write("""
        @pytest.mark.vram(max_mb=4)
        def test_untouched():
            pass
    """)
    result = project.run()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["vram: 1 budget was not measured: the test never touched the device", "*test_untouched"]
    )
    project.run("-o", "vram_on_unmeasured=fail").assert_outcomes(failed=1)


def test_a_metric_that_the_device_does_not_report_is_unmeasured(project) -> None:
    project.write("""
        @pytest.mark.vram(max_mb=1, metric="device")
        def test_device():
            free(alloc(4 * MB))

        @pytest.mark.vram(max_mb=1, metric="reserved")
        def test_reserved():
            free(alloc(MB))
    """)
    result = project.run()
    result.assert_outcomes(skipped=1, failed=1)
    result.stdout.fnmatch_lines(["*2.00 MiB of reserved memory*", "*reports no device figure*"])
    project.run("-o", "vram_on_unmeasured=fail").assert_outcomes(failed=2)


def test_what_another_process_did_never_fails_a_budget(project) -> None:
    project.write("""
        from made_up_device import PROBE

        @pytest.mark.vram(max_mb=1)
        def test_neighbour():
            PROBE.foreign = True
            free(alloc(4 * MB))
    """)
    result = project.run()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*another process's memory on the card moved*"])


def test_min_free_skips(project) -> None:
    project.write("""
        @pytest.mark.vram(min_free_gb=1.5)
        def test_large(): raise SystemExit

        @pytest.mark.vram(min_free_gb=0.5)
        def test_small(): pass
    """)
    result = project.run("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs 1.50 GiB of free GPU memory*there are 1.00 GiB*"])


@pytest.mark.parametrize("workers", [(), ("-n2",), ("-n2", "--dist=loadgroup")], ids=["one", "two", "loadgroup"])
def test_the_report_is_the_same_with_many_workers(project, workers: tuple[str, ...]) -> None:
    project.write(TWO_TESTS)
    tests = project.report(*workers, plugins=("xdist",) if workers else ())
    assert tests["test_fits"]["verdict"] == {"verdict": "within", "headroom_bytes": 2**20}
    assert tests["test_over"]["verdict"] == {"verdict": "exceeded", "over_bytes": 2**20}
    assert tests["test_over"]["outcome"] == "failed"


def test_figures_survive_a_worker_that_crashes(project) -> None:
    project.write("""
        import os

        @pytest.mark.vram(max_mb=4)
        def test_fits():
            free(alloc(3 * MB))

        def test_crash():
            os._exit(1)
    """)
    assert "test_fits" in project.report("-n1", plugins=("xdist",))


def test_baseline_fails_what_grew_lists_what_shrank_and_updates_only_what_ran(project) -> None:
    source = """
        @pytest.mark.parametrize("name", ["a", "b", "c"])
        def test_size(name):
            free(alloc({sizes}[name]))
    """
    project.write(source.format(sizes={"a": 100 * 2**20, "b": 100 * 2**20, "c": 100 * 2**20}))
    path = project.pytester.path / "baseline.json"
    project.run("--vram-baseline=baseline.json").stderr.fnmatch_lines(["*baseline.json is not there*"])
    project.run("--vram-baseline=baseline.json", "--vram-update-baseline", "-k", "a] or b]").assert_outcomes(
        passed=2, deselected=1
    )
    first = path.read_text()
    assert json.loads(first)["peaks"]["test_it.py::test_size[a]"] == {"Made-up 9000 (cuda)": 100 * 2**20}
    project.write(source.format(sizes={"a": 103 * 2**20, "b": 90 * 2**20, "c": 2**20}))
    result = project.run("--vram-baseline=baseline.json", "--vram-tolerance=2")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*test_size?a? grew from 100 MiB to 103 MiB (+3.0%) on Made-up 9000 (cuda); the limit is 2%*",
         "*test_size?b? shrank from 100 MiB to 90.0 MiB (-10.0%)*", "*1 tests have no entry*", "*test_size?c?*"]
    )  # fmt: skip
    project.run("--vram-baseline=baseline.json", "--vram-tolerance=4").assert_outcomes(passed=3)
    project.run("--vram-baseline=baseline.json", "--vram-update-baseline", "-k", "b]").assert_outcomes(
        passed=1, deselected=2
    )
    peaks = json.loads(path.read_text())["peaks"]
    assert peaks["test_it.py::test_size[a]"] == {"Made-up 9000 (cuda)": 100 * 2**20}
    assert peaks["test_it.py::test_size[b]"] == {"Made-up 9000 (cuda)": 90 * 2**20}


def test_a_baseline_is_what_it_was_at_the_start(project) -> None:
    """The file may change meanwhile: the summary speaks of the peaks that the report was held against."""
    project.write("""
        import os

        @pytest.fixture
        def checkout():
            yield
            os.unlink("baseline.json")

        def test_size(checkout):
            free(alloc(100 * 2**20))
    """)
    peaks = {"test_it.py::test_size": {"Made-up 9000 (cuda)": 200 * 2**20}}
    (project.pytester.path / "baseline.json").write_text(json.dumps({"version": 1, "peaks": peaks}))
    result = project.run("--vram-baseline=baseline.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*test_size shrank from 200 MiB to 100 MiB (-50.0%)*"])


def test_suggestions(project) -> None:
    project.write("""
        def test_unmarked():
            free(alloc(100 * MB))

        @pytest.mark.vram(max_gb=16)
        def test_slack():
            free(alloc(2048 * MB))

        @pytest.mark.vram(max_mb=110)
        def test_tight():
            free(alloc(100 * MB))
    """)
    result = project.run("--vram-suggest")
    result.stdout.fnmatch_lines(
        ["@pytest.mark.vram(max_mb=105)*# test_it.py::test_unmarked: peak 100 MiB (cuda)",
         "@pytest.mark.vram(max_gb=2.1)*# test_it.py::test_slack: peak 2.00 GiB (cuda)"]
    )  # fmt: skip
    assert "test_tight: peak" not in result.stdout.str()


def test_another_plugin_hears_of_each_record(project) -> None:
    project.conftest("""
        def pytest_vram_record(item, record):
            print("heard of", item.name, record.measurements[0].peak.allocated_bytes)
    """)
    project.write("""
        @pytest.mark.vram(max_mb=4)
        def test_fits():
            free(alloc(3 * MB))
    """)
    project.run("-s").stdout.fnmatch_lines(["*heard of test_fits 3145728"])


def test_unused_it_brings_in_nothing(project) -> None:
    project.pytester.makeconftest("")
    project.pytester.makepyfile("""
        import sys

        def test_nothing_was_imported():
            heavy = {"torch", "pynvml", "pandas", "pytest_vram.plugin.runner", "pytest_vram.drygpu"}
            assert not heavy & set(sys.modules)
    """)
    project.run("-W", "error").assert_outcomes(passed=1)


def test_without_the_plugin_nothing_of_it_is_there(project) -> None:
    project.pytester.makeconftest("")
    project.pytester.makepyfile("def test_it(): pass")
    project.pytester.runpytest_subprocess("-p", "no:vram").assert_outcomes(passed=1)


def test_warnings_as_errors(project) -> None:
    project.write(TWO_TESTS)
    project.run("-W", "error", "--vram-report").assert_outcomes(passed=1, failed=1)
