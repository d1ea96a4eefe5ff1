"""Render the findings of a report as GitLab's code-quality JSON, which a merge request shows beside the lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vram.report.disk import repository
from pytest_vram.report.findings import Places, findings

if TYPE_CHECKING:
    from pytest_vram.memory import Report

_SEVERITY = {"error": "major", "warning": "minor"}


def render(report: Report, places: Places | None = None) -> str:
    """Return the report's findings as JSON text.

    GitLab leaves out an issue without a file, so a finding without a place names the test's file.

    Args:
        report: the report.
        places: finds the report's files; by default in the working directory and the repository around it.
    """
    here = Path.cwd()
    found = findings(report, places or Places(here, repository(here)))
    issues = [
        {
            "type": "issue",
            "check_name": f"pytest-vram/{finding.rule}",
            "description": finding.text,
            "fingerprint": finding.fingerprint,
            "severity": _SEVERITY[finding.level],
            "location": {
                "path": finding.place.path if finding.place else finding.nodeid.partition("::")[0],
                "lines": {"begin": finding.place.line if finding.place else 1},
            },
        }
        for finding in found
    ]
    return json.dumps(issues, indent=1, ensure_ascii=False) + "\n"
