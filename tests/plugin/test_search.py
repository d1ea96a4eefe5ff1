"""``search=True`` climbs to the example that breaks the budget, where as many random examples miss it."""

from __future__ import annotations

import re

HILL = """
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @pytest.mark.vram(max_mb=100{search})
    @given(x=st.integers(0, 100_000), y=st.integers(0, 100_000))
    @settings(max_examples=300, derandomize=True, database=None, deadline=None)
    def test_it(x, y):
        # Planted: more than 100 MB only within 1,747 steps of (31,415, 92,653): one random example in 1,600.
        free(alloc(101 * MB - 600 * (abs(x - 31_415) + abs(y - 92_653))))
"""


def test_a_planted_worst_case_is_found_by_climbing_and_missed_at_random(project) -> None:
    project.write(HILL.format(search=""))
    project.run().assert_outcomes(passed=1)
    project.write(HILL.format(search=", search=True"))
    result = project.run()
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r".*example x=\d+, y=\d+"])


def test_the_search_ends_at_the_smallest_batch_that_breaks_the_budget(project) -> None:
    project.write("""
        from hypothesis import given, settings
        from pytest_vram import strategies as vram

        @pytest.mark.vram(max_mb=1, search=True)
        @given(shape=vram.batches(max_tokens=4096))
        @settings(max_examples=20, derandomize=True, database=None, deadline=None)
        def test_any_batch_fits(shape):
            free(alloc(shape.tokens * 400))  # 2,621 tokens fit
    """)
    result = project.run()
    result.assert_outcomes(failed=1)
    rows, seq = re.search(r"  example shape=BatchShape\(rows=(\d+), seq=(\d+)\)", result.stdout.str()).groups()
    assert 2622 <= int(rows) * int(seq) < 2622 + int(rows)  # one token a row less would fit
