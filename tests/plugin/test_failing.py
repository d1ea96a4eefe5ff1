"""How a broken budget fails: as a failure of the test, with everything a person needs in its message."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest


def test_the_message_names_limit_peak_phase_fixtures_lines_and_a_remedy(project) -> None:
    project.write("""
        @pytest.fixture(scope="session")
        def llama():
            yield alloc(3 * MB)

        @pytest.mark.vram(max_mb=8)
        def test_step(llama, vram):
            with vram.measure("forward"):
                activations = alloc(1 * MB)
            with vram.measure("backward"):
                gradients = alloc(6 * MB)
    """)
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "the test needed 10.0 MiB of allocated memory, 2.00 MiB more than its budget of 8.00 MiB",
            "  peak          10,485,760 bytes",
            "  budget         8,388,608 bytes  (marker at test_it.py:*)",
            "  device  Made-up 9000, cuda: measured on the GPU",
            "  where   in phase 'backward'",
            "  phases  forward 4.00 MiB, backward 10.0 MiB",
            "  session fixture `llama` holds 3.00 MiB",
            "  held at the peak, by the line that allocated it:",
            "     6.00 MiB  test_it.py:* in test_step  (60%)",
            "     3.00 MiB  test_it.py:* in llama  (30%)",
            "  try: *",
        ]
    )
    result.stdout.no_fnmatch_line("*runner.py*")


def test_junit_xfail_and_exit_code(project) -> None:
    project.write("""
        @pytest.mark.vram(max_mb=1)
        def test_over():
            free(alloc(2 * MB))

        @pytest.mark.xfail(raises=VramBudgetExceeded, strict=True)
        @pytest.mark.vram(max_mb=1)
        def test_expected():
            free(alloc(2 * MB))

        @pytest.mark.xfail(raises=VramBudgetExceeded, strict=True)
        @pytest.mark.vram(max_mb=2)
        def test_strict():
            free(alloc(2 * MB))
    """)
    result = project.run("--junitxml=junit.xml")
    result.assert_outcomes(failed=2, xfailed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    cases = {case.get("name"): case for case in ET.parse(project.pytester.path / "junit.xml").iter("testcase")}
    failure = cases["test_over"].find("failure")
    assert failure is not None
    assert "1.00 MiB more than its budget of 1.00 MiB" in (failure.text or "")
    properties = [p.get("value") or "" for p in cases["test_over"].iter("property") if p.get("name") == "vram"]
    assert len(properties) == 1
    assert '"allocated_bytes":2097152' in properties[0]


def test_a_test_that_failed_already_keeps_its_error_and_gets_the_memory(project) -> None:
    project.write("""
        import unittest

        @pytest.mark.vram(max_mb=1)
        def test_wrong():
            held = alloc(2 * MB)
            assert 1 == 2

        class Case(unittest.TestCase):
            @pytest.mark.vram(max_mb=1)
            def test_wrong_too(self):
                held = alloc(2 * MB)
                self.assertEqual(3, 4)
    """)
    result = project.run()
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*assert 1 == 2*", "*GPU memory*", "Made-up 9000 (cuda): peak allocated 2.00 MiB*"])
    result.stdout.fnmatch_lines(["*3 != 4*"])
    result.stdout.no_fnmatch_line("*more than its budget*")


def test_a_phase_has_a_budget_and_fails_at_the_users_line(project) -> None:
    project.write("""
        def test_phase(vram):
            with vram.measure("fits", max_mb=1):
                free(alloc(MB))
            with vram.measure("does not", max_mb=1):
                free(alloc(MB + 1))
            raise SystemExit("not reached")
    """)
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(['*with vram.measure("does not", max_mb=1):', "*phase 'does not' needed 1.00 MiB*"])


def test_reruns_and_async(project) -> None:
    project.ini("asyncio_mode = auto", "asyncio_default_fixture_loop_scope = function")
    project.write("""
        runs = []

        @pytest.mark.vram(max_mb=1)
        def test_flaky():
            runs.append(1)
            free(alloc((3 - len(runs)) * MB))

        @pytest.mark.vram(max_mb=1)
        async def test_async():
            free(alloc(2 * MB))
    """)
    result = project.run("--reruns=1", plugins=("rerunfailures", "asyncio"))
    result.stdout.fnmatch_lines(["*R*"])
    outcomes = result.parseoutcomes()
    assert (outcomes["failed"], outcomes["passed"]) == (1, 1)
    assert "async" not in result.stdout.str().split("short test summary")[1].replace("test_async", "")


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="subtests are a part of pytest from 9 on")
def test_subtests(project) -> None:
    project.write("""
        @pytest.mark.vram(max_mb=1)
        def test_subtests(subtests):
            for size in (1, 2):
                with subtests.test(size=size):
                    free(alloc(size * MB))
    """)
    result = project.run()
    assert result.parseoutcomes()["failed"] >= 1
    result.stdout.fnmatch_lines(["*the test needed 2.00 MiB*"])


def test_enforce_fails_the_line_that_breaks_the_budget_and_is_always_lifted(project) -> None:
    project.write("""
        from made_up_device import PROBE

        @pytest.mark.vram(max_mb=2, enforce=True)
        def test_capped():
            first = alloc(2 * MB)
            second = alloc(1)  # this line

        def test_lifted():
            assert PROBE.caps == [2 * MB, None]
            alloc(4 * MB)
    """)
    result = project.run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([">*second = alloc(1)  # this line", "*MemoryError: CUDA out of memory*"])
