from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "golden"))
import sample

from pytest_vram.ci import comment
from pytest_vram.memory import HostPeak, TestRecord
from pytest_vram.units import GIB


def test_the_first_line_tells_the_comments_of_two_jobs_apart() -> None:
    marks = {comment.marker(name) for name in ("", "torch 2.6", "torch 2.7")}
    assert len(marks) == 3
    for mark in (*marks, comment.marker("a --> b\nc")):
        assert mark.startswith("<!-- pytest-vram")
        assert mark.endswith("-->")
        assert mark.count("-->") == 1
        assert "\n" not in mark


def test_a_comment_is_never_longer_than_github_takes() -> None:
    change = sample.change()
    (grown,) = comment.grown(change)
    test = next(t for t in change.after.tests if t.nodeid == grown.nodeid)
    before = next(t for t in change.before.tests if t.nodeid == grown.nodeid) if change.before else None
    assert before is not None
    names = [f"{'ü' * 3000}{i}" for i in range(40)]
    after = replace(change.after, tests=tuple(replace(test, nodeid=name) for name in names))
    old = replace(change.after, tests=tuple(replace(before, nodeid=name) for name in names))
    text = comment.render(replace(change, after=after, before=old))
    assert len(text.encode()) < 65_536
    assert text.count("<details>") == text.count("</details>")
    assert text.count("<details>") == 10
    assert "The page shows what grew in 30 more tests." in text
    assert "20 more tests; the page shows all." in text
    assert text.startswith(comment.marker(change.name))


def test_nothing_grew_and_nothing_measured() -> None:
    change = sample.change()
    same = replace(change, before=change.after)
    assert comment.render(same).splitlines()[1].endswith("1 over budget, 2 failed")
    calm = replace(change.after, tests=change.after.tests[1:2])
    assert comment.render(replace(change, after=calm, before=calm)).splitlines()[1].endswith("nothing grew")
    nothing = replace(change.after, tests=())
    assert comment.render(replace(change, after=nothing, before=None)).splitlines()[1].endswith("nothing was measured")


def test_a_failing_job_is_never_within_budget() -> None:
    report = sample.report()
    over = HostPeak(limit_bytes=GIB, peak_bytes=3 * GIB)
    host = TestRecord(nodeid="test_host", outcome="failed", host=over)
    wrong = TestRecord(nodeid="test_wrong", outcome="failed")
    calm = report.tests[1]

    def headline(*tests: TestRecord) -> str:
        return text(*tests).splitlines()[1].removeprefix("## GPU memory: ")

    def text(*tests: TestRecord) -> str:
        return comment.render(comment.Comparison(after=replace(report, tests=tests)))

    assert headline(calm) == "all within budget"
    assert headline(calm, host) == "1 over the budget of host memory"
    assert headline(report.tests[3]) == "1 failed", "it left memory behind"
    assert headline(report.tests[0], host, wrong) == "1 over budget, 1 over the budget of host memory, 1 failed"
    assert "Host memory:\n\n- test\\_host: 3.00 GiB of 1.00 GiB, 2.00 GiB over\n" in text(host)
    assert "Failed: test\\_wrong." in text(host, wrong)
    same = replace(report, tests=(calm, wrong))
    found = comment.render(comment.Comparison(after=same, before=same))
    assert found.splitlines()[1] == "## GPU memory: 1 failed"
