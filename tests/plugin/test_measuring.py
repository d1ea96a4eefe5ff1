"""What counts as a test's peak: its fixtures, its phases, nothing of anybody else's."""

from __future__ import annotations


def test_fixtures_are_counted_and_named_only_for_the_tests_that_use_them(project) -> None:
    project.write("""
        @pytest.fixture(scope="session")
        def llama():
            yield alloc(4 * MB)

        @pytest.fixture
        def batch():
            handle = alloc(MB)
            yield handle
            free(handle)

        def test_uses_both(llama, batch):
            free(alloc(2 * MB))

        def test_uses_neither():
            free(alloc(2 * MB))

        def test_asks_late(request):
            request.getfixturevalue("llama")
            free(alloc(2 * MB))
    """)
    tests = project.report()
    both = tests["test_uses_both"]["measurements"][0]
    assert both["peak"]["allocated_bytes"] == 7 * 2**20
    assert {(f["name"], f["scope"], f["size_bytes"]) for f in both["fixtures"]} == {
        ("llama", "session", 4 * 2**20),
        ("batch", "function", 2**20),
    }
    neither = tests["test_uses_neither"]["measurements"][0]
    assert neither["peak"]["allocated_bytes"] - neither["uncounted_bytes"] == 2 * 2**20
    late = tests["test_asks_late"]["measurements"][0]
    assert late["peak"]["allocated_bytes"] - late.get("uncounted_bytes", 0) == 6 * 2**20


def test_unittest_class_fixtures_are_counted(project) -> None:
    project.write("""
        import unittest

        class Case(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                cls.model = alloc(3 * MB)

            @classmethod
            def tearDownClass(cls):
                free(cls.model)

            @pytest.mark.vram(max_mb=3)
            def test_over(self):
                free(alloc(1))
    """)
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*class fixture `*` holds 3.00 MiB"])


def test_scope_call_leaves_the_fixtures_out(project) -> None:
    project.write("""
        @pytest.fixture
        def llama():
            return alloc(4 * MB)

        @pytest.mark.vram(max_mb=1, scope="call")
        def test_call(llama):
            free(alloc(MB))

        @pytest.mark.vram(max_mb=1, scope="call")
        def test_call_over(llama):
            free(alloc(MB + 1))
    """)
    project.run().assert_outcomes(passed=1, failed=1)


def test_phases_nest_and_the_programs_own_resets_lose_nothing(project) -> None:
    project.write("""
        from made_up_device import reset_as_the_program_would

        def test_phases(vram):
            held = alloc(MB)
            with vram.measure("outer"):
                free(alloc(8 * MB))
                with vram.measure("inner"):
                    free(alloc(2 * MB))
                    reset_as_the_program_would()
                assert vram["inner"].allocated == 3 * MB
                assert vram["inner"].added == 2 * MB
            assert vram["outer"].allocated == 9 * MB
            free(alloc(4 * MB))
            assert vram.peak.allocated == 9 * MB
            with pytest.raises(VramError, match="no phase 'x'.*inner, outer"):
                vram["x"]

        def test_compare_and_scaling(vram):
            peaks = vram.compare(small=lambda: free(alloc(MB)), large=lambda: free(alloc(3 * MB)))
            assert peaks["large"].added == 3 * peaks["small"].added
            linear = vram.scaling("seq", [1, 2, 4, 8], lambda seq: free(alloc(seq * MB)))
            assert 0.99 < linear.order < 1.01
            square = vram.scaling("n", [1, 2, 4, 8], lambda n: free(alloc(n * n * MB + 5 * MB)))
            assert 1.99 < square.order < 2.01
    """)
    project.run().assert_outcomes(passed=2)


def test_a_leak_is_the_leaking_tests_own(project) -> None:
    project.write("""
        kept = []

        def test_leaks():
            kept.append(alloc(2 * MB))

        @pytest.mark.vram(max_mb=1)
        def test_after():
            free(alloc(MB))

        @pytest.mark.vram(max_leak_mb=0)
        def test_clean():
            free(alloc(MB))

        @pytest.mark.vram(max_leak_mb=1)
        @pytest.mark.parametrize("extra", [0, 1])
        def test_limit(extra):
            kept.append(alloc(MB + extra))

        @pytest.fixture(scope="module")
        def model():
            handle = alloc(5 * MB)
            yield handle
            free(handle)

        @pytest.mark.vram(max_leak_mb=0)
        def test_a_fixture_that_lives_on_is_no_leak(model):
            pass

        @pytest.mark.vram(max_leak_mb=0)
        def test_nor_is_one_that_goes(model):
            pass
    """)
    result = project.run("--vram-report")
    result.assert_outcomes(passed=7, errors=1)
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_limit[[]1] - *VramLeak: the test left*"])


def test_garbage_in_a_cycle_is_no_leak(project) -> None:
    project.write("""
        class Owner:
            def __init__(self):
                self.me, self.handle = self, alloc(MB)

            def __del__(self):
                free(self.handle)

        @pytest.mark.vram(max_leak_mb=0)
        def test_cycle():
            Owner()
    """)
    project.run().assert_outcomes(passed=1)


def test_each_example_of_hypothesis_counts_by_itself_and_the_worst_is_reported(project) -> None:
    project.write("""
        from hypothesis import given, settings, strategies as st

        @settings(derandomize=True, database=None, max_examples=50)
        @given(rows=st.integers(1, 40), seq=st.integers(1, 40))
        @pytest.mark.vram(max_mb=2)
        def test_fits(rows, seq):
            free(alloc(rows * seq * 1000))

        @settings(derandomize=True, database=None, max_examples=50)
        @given(rows=st.integers(1, 40), seq=st.integers(1, 40))
        @pytest.mark.vram(max_mb=1)
        def test_over(rows, seq):
            free(alloc((rows >= 7) * 2 * MB))
    """)
    result = project.run("--vram-output=report.json", "-v")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*  example rows=7, seq=1"])
    import json

    tests = {
        t["nodeid"].partition("::")[2]: t
        for t in json.loads((project.pytester.path / "report.json").read_text())["tests"]
    }
    assert tests["test_fits"]["worst_example"].startswith("rows=")
    rows, seq = (int(part.partition("=")[2]) for part in tests["test_fits"]["worst_example"].split(", "))
    assert tests["test_fits"]["measurements"][0]["peak"]["allocated_bytes"] == rows * seq * 1000


def test_search_finds_the_planted_worst_case_that_chance_misses(project) -> None:
    source = """
        from hypothesis import given, settings, strategies as st

        @settings(derandomize=True, database=None, max_examples=200)
        @given(rows=st.integers(0, 100_000))
        @pytest.mark.vram(max_mb=99.99{search})
        def test_any_batch_fits(rows):
            free(alloc(max(0, 100 * MB - abs(rows - 77_777) * 1000)))
    """
    project.write(source.format(search=""))
    project.run().assert_outcomes(passed=1)
    project.write(source.format(search=", search=True"))
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*example rows=777*"])
