"""What earlier tests leave counts against them and not against those that come after, and hides nothing."""

from __future__ import annotations

import pytest


def test_what_an_unmarked_test_leaves_is_its_own(project) -> None:
    project.write("""
        kept = []

        @pytest.mark.vram(max_mb=1)
        def test_first():
            free(alloc(MB))

        def test_unmarked():
            kept.append(alloc(8 * MB))

        @pytest.mark.vram(max_mb=1)
        def test_after():
            free(alloc(MB))

        @pytest.mark.vram(max_mb=1)
        def test_over():
            free(alloc(MB + 1))
    """)
    result = project.run()
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*_ test_over _*"])


def test_room_made_by_a_failed_tests_traceback_is_not_free_of_charge(project) -> None:
    """pytest lets go of the last failure's traceback in the midst of the next test."""
    project.write("""
        from made_up_device import Tensor

        @pytest.mark.vram(max_mb=8)
        def test_fails():
            kept_by_the_traceback = Tensor(8 * MB)
            raise ValueError

        @pytest.mark.vram(max_mb=4)
        def test_over_all_the_same():
            Tensor(8 * MB)
    """)
    result = project.run()
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["the test needed 8.00 MiB*4.00 MiB more*"])


def test_room_made_by_the_garbage_collector_is_not_free_of_charge(project) -> None:
    project.write("""
        import gc
        from made_up_device import Tensor

        @pytest.mark.vram(max_mb=8)
        def test_leaves_a_cycle():
            owner = Tensor(8 * MB)
            owner.me = owner

        @pytest.mark.vram(max_mb=4)
        def test_over_all_the_same():
            gc.collect()
            Tensor(8 * MB)
    """)
    project.run("-p", "no:cacheprovider").assert_outcomes(passed=1, failed=1)


def test_a_leak_is_seen_when_the_last_user_of_a_fixture_leaks(project) -> None:
    """The fixture goes, and the gradients that an earlier test hung on it: more than the leak is freed."""
    project.write("""
        kept = []

        @pytest.fixture(scope="module")
        def model():
            held = [alloc(5 * MB)]
            yield held
            for handle in held:
                free(handle)

        def test_backward(model):
            model.append(alloc(5 * MB))

        @pytest.mark.vram(max_leak_mb=0)
        def test_leaks(model):
            kept.append(alloc(MB))
    """)
    result = project.run()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*the test left 1.00 MiB (1,048,576 bytes) behind*",
            "*still there, by the line that allocated it:*",
            "* 1.00 MiB  test_*.py:* in test_leaks*",
        ]
    )


def test_fixtures_of_unmarked_tests_are_known_to_those_that_use_them_later(project) -> None:
    project.write("""
        @pytest.fixture(scope="session")
        def llama():
            return alloc(4 * MB)

        def test_unmarked(llama):
            pass

        @pytest.mark.vram(max_mb=1)
        def test_without():
            free(alloc(MB))

        @pytest.mark.vram(max_mb=1)
        def test_with(llama):
            pass
    """)
    result = project.run()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*_ test_with _*", "*session fixture `llama` holds 4.00 MiB*"])


def test_devices_are_counted_apart(project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADE_UP_DEVICES", "2")
    project.write("""
        kept = []

        @pytest.fixture(scope="module")
        def on_both():
            return alloc(4 * MB, 0), alloc(2 * MB, 1)

        @pytest.mark.vram(max_mb=2, device=1)
        def test_on_one(on_both):
            pass

        @pytest.mark.vram(max_mb=6)
        def test_worst_of_both(on_both):
            free(alloc(4 * MB, 1))

        @pytest.mark.vram(max_mb=6)
        def test_over_on_the_second(on_both):
            free(alloc(4 * MB + 1, 1))

        @pytest.mark.vram(max_leak_mb=0)
        def test_leaks_on_the_smaller(on_both):
            kept.append(alloc(MB, 1))

        def test_phase(on_both, vram):
            with pytest.raises(VramBudgetExceeded, match="3.00 MiB"):
                with vram.measure("second", max_mb=5):
                    free(alloc(6 * MB, 1))
    """)
    result = project.run("--vram-output=report.json")
    result.assert_outcomes(passed=4, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*_ test_over_on_the_second _*", "*module fixture `on_both` holds 2.00 MiB*"])


def test_a_probe_that_breaks_down_hides_no_error_of_the_test(project) -> None:
    project.write("""
        from made_up_device import PROBE

        @pytest.mark.vram(max_mb=1)
        def test_own_error(monkeypatch):
            PROBE.holders = None
            alloc(1)
            raise ValueError("the user's own")
    """)
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*ValueError: the user's own", "*could not be read: TypeError*"])
    result.stdout.no_fnmatch_line("*During handling*")


def test_values_are_asked_for_by_the_mark_alone(project) -> None:
    project.conftest("""
        made_up_device.PROBE.kind = "dry"
    """)
    project.write("""
        @pytest.mark.vram_values
        def test_values(): raise SystemExit
    """)
    result = project.run("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs values computed on the device*dry GPU*"])


@pytest.mark.parametrize("scope", ["function", "module"])
def test_a_fixture_that_goes_with_its_test_is_no_leak_of_that_test(project, scope: str) -> None:
    """pytest holds the values of a test's fixtures until after the teardown."""
    project.write(f"""
        from made_up_device import Tensor

        @pytest.fixture(scope="{scope}")
        def model():
            return Tensor(8 * MB)

        @pytest.fixture(scope="module")
        def other():
            return Tensor(2 * MB)

        @pytest.mark.vram(max_leak_mb=0)
        def test_last(model, other):
            pass
    """)
    (test,) = project.report().values()
    assert test["outcome"] == "passed"
    assert not test["measurements"][0].get("leaked_bytes")


def test_a_librarys_workspace_is_no_leak_when_a_fixture_goes_before_it(project) -> None:
    project.conftest("""
        made_up_device.WORKSPACES = []

        def settle():
            while made_up_device.WORKSPACES:
                made_up_device.free(made_up_device.WORKSPACES.pop())

        made_up_device.PROBE.settle = settle
    """)
    project.write("""
        from made_up_device import Tensor, WORKSPACES

        @pytest.fixture(scope="module")
        def model():
            return Tensor(8 * MB)

        @pytest.mark.vram(max_leak_mb=0)
        def test_multiplies(model):
            WORKSPACES.append(alloc(MB))
    """)
    project.run().assert_outcomes(passed=1)
