"""A budget passes at its limit and fails one byte above it, wherever it is declared."""

from __future__ import annotations

import pytest


def test_one_below_at_and_one_above_the_limit(project) -> None:
    project.write("""
        @pytest.mark.vram(max_mb=1)
        @pytest.mark.parametrize("extra", [-1, 0, 1])
        def test_limit(extra):
            free(alloc(MB + extra))
    """)
    project.run().assert_outcomes(passed=2, failed=1)


def test_nearest_marker_wins_and_every_place_works(project) -> None:
    project.write("""
        import unittest

        pytestmark = pytest.mark.vram(max_mb=1)

        def test_module():
            free(alloc(2 * MB))

        @pytest.mark.vram(max_mb=3)
        class TestClass:
            def test_class(self):
                free(alloc(2 * MB))

            @pytest.mark.vram(max_mb=1)
            def test_method(self):
                free(alloc(2 * MB))

        @pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.vram(max_mb=2)), 2])
        def test_param(size):
            free(alloc(size * MB))

        class Case(unittest.TestCase):
            def test_unittest(self):
                free(alloc(2 * MB))

            @pytest.mark.vram(max_mb=2)
            def test_unittest_fits(self):
                free(alloc(2 * MB))
    """)
    result = project.run("-v")
    result.assert_outcomes(passed=3, failed=4)
    result.stdout.fnmatch_lines_random(
        ["*::test_module FAILED*", "*::test_class PASSED*", "*::test_method FAILED*", "*::test_param?2_0? PASSED*",
         "*::test_param?2_1? FAILED*", "*::test_unittest FAILED*", "*::test_unittest_fits PASSED*"]
    )  # fmt: skip


def test_default_budget_from_the_ini_file(project) -> None:
    project.ini("vram_max_gb = 0.001")
    project.write("""
        def test_unmarked():
            free(alloc(2 * MB))

        @pytest.mark.vram(max_mb=2)
        def test_marked():
            free(alloc(2 * MB))
    """)
    result = project.run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*(ini at vram_max_gb)*"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("16", "vram(16) takes no positional arguments*max_gb*min_free_gb*"),
        ("max_bg=16", "*no argument 'max_bg': did you mean*max_gb*"),
        ("max_gb='16'", "*max_gb='16': write a number, without quotes*"),
        ("max_gb=-1", "*max_gb=-1: must be above 0*"),
        ("max_gb=0", "*max_gb=0: must be above 0*"),
        ("max_gb=float('nan')", "*max_gb=nan: must be above 0, and finite*"),
        ("max_gb=True", "*max_gb=True: write a number*"),
        ("max_gb=16 * 2**30", "*that many gigabytes?*max_mb*"),
        ("max_gb=1, max_mb=1", "*two limits: use one*"),
        ("max_gb=1, metric='vram'", "*metric='vram': choose 'allocated', 'reserved', 'device'*"),
        ("max_gb=1, scope='function'", "*scope='function': choose 'test', 'call'*"),
        ("max_gb=1, enforce=1", "*enforce=1: choose True or False*"),
        ("max_gb=1, device='cuda:0'", "*device='cuda:0': write the device's index*"),
        ("max_leak_mb=-1", "*max_leak_mb=-1: must be 0 or more*"),
    ],
)
def test_a_wrong_marker_is_told_at_collection(project, arguments: str, said: str) -> None:
    project.write(f"""
        @pytest.mark.vram({arguments})
        def test_wrong():
            raise SystemExit("ran")
    """)
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_wrong: {said}"])


def test_every_wrong_marker_is_told_at_once(project) -> None:
    project.write("""
        @pytest.mark.vram(max_gbs=1)
        def test_a(): pass

        @pytest.mark.vram(1)
        def test_b(): pass
    """)
    project.run().stderr.fnmatch_lines(["*test_a: *max_gbs*", "*test_b: *positional*"])
