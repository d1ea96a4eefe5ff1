"""Render the findings of a report as SARIF 2.1.0, which code scanning services read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pytest_vram import __version__
from pytest_vram.report.disk import repository
from pytest_vram.report.findings import RULES, Finding, Places, findings

if TYPE_CHECKING:
    from pytest_vram.memory import Report

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render(report: Report, places: Places | None = None) -> str:
    """Return the report's findings as SARIF text.

    Args:
        report: the report.
        places: finds the report's files; by default in the working directory and the repository around it.
    """
    here = Path.cwd()
    found = findings(report, places or Places(here, repository(here)))
    rules = list(RULES)
    driver = {
        "name": "pytest-vram",
        "version": __version__,
        "rules": [
            {
                "id": rule,
                "shortDescription": {"text": text},
                "defaultConfiguration": {"level": "warning" if rule == "not-measured" else "error"},
            }
            for rule, text in RULES.items()
        ],
    }
    results = [_result(finding, rules.index(finding.rule)) for finding in found]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, ensure_ascii=False) + "\n"


def _result(finding: Finding, rule: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": rule,
        "level": finding.level,
        "message": {"text": finding.text},
        "partialFingerprints": {"pytestVram/v1": finding.fingerprint},
    }
    if finding.place is not None:
        artifact = {"uri": quote(finding.place.path), "uriBaseId": "%SRCROOT%"}
        region = {"startLine": finding.place.line}
        result["locations"] = [{"physicalLocation": {"artifactLocation": artifact, "region": region}}]
    return result
