"""Read what a GitHub runner tells a job, and keep the job's one comment on a pull request up to date."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import VramError
from pytest_vram.report.disk import repository

if TYPE_CHECKING:
    from collections.abc import Mapping

API = "https://api.github.com"
_PAGES = 30
_SECONDS = 30


class CommentError(VramError):
    """The comment could not be written. The message says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The job that this process is a part of.

    Attributes:
        workspace: the folder of the checkout.
        repository: ``owner/name``.
        api: the address of GitHub's API.
        token: the token that may write comments; ``""`` if there is none.
        summary: the file whose text the job's summary shows.
        link: the address of the job's page.
        pull_request: the number of the pull request; ``None`` if the job is not for one.
        base: the commit that the pull request is based on.
        base_name: the branch that the pull request is merged into.
    """

    workspace: Path
    repository: str = ""
    api: str = API
    token: str = ""
    summary: Path | None = None
    link: str = ""
    pull_request: int | None = None
    base: str | None = None
    base_name: str = "base"


def job(environment: Mapping[str, str]) -> Job:
    """Return the job that the variables of a runner describe. Outside of a runner, only the folder is known."""
    event = _event(environment.get("GITHUB_EVENT_PATH"))
    pull = event.get("pull_request") or {}
    base = pull.get("base") or {}
    server, slug = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_REPOSITORY", "")
    run = environment.get("GITHUB_RUN_ID")
    summary = environment.get("GITHUB_STEP_SUMMARY")
    return Job(
        workspace=Path(environment.get("GITHUB_WORKSPACE") or repository(Path.cwd())),
        repository=slug,
        api=environment.get("GITHUB_API_URL") or API,
        token=environment.get("GITHUB_TOKEN", ""),
        summary=Path(summary) if summary else None,
        link=f"{server}/{slug}/actions/runs/{run}" if server and run else "",
        pull_request=pull.get("number"),
        base=base.get("sha"),
        base_name=base.get("ref") or "base",
    )


def comment(job: Job, body: str) -> str:
    """Write the comment, or change the one that an earlier job wrote; return ``written`` or ``changed``.

    Args:
        job: the job, with the number of a pull request.
        body: the text, whose first line identifies the job's comment.

    Raises:
        CommentError: if there is no token, the token may not write comments, or GitHub cannot be reached.
    """
    if not job.token:
        raise CommentError("no GITHUB_TOKEN: pass `github-token: ${{ github.token }}`")
    mark = body.partition("\n")[0]
    issue = f"{job.api}/repos/{job.repository}/issues"
    for page in range(1, _PAGES + 1):
        found = _call(job, "GET", f"{issue}/{job.pull_request}/comments?per_page=100&page={page}")
        for one in found:
            # A person may quote the comment; the marker is then not at its start.
            if str(one.get("body", "")).startswith(mark):
                _call(job, "PATCH", f"{issue}/comments/{one['id']}", {"body": body})
                return "changed"
        if len(found) < 100:
            break
    _call(job, "POST", f"{issue}/{job.pull_request}/comments", {"body": body})
    return "written"


def _call(job: Job, method: str, url: str, data: Any = None) -> Any:
    request = urllib.request.Request(
        url,
        method=method,
        data=None if data is None else json.dumps(data).encode(),
        headers={
            "Authorization": f"Bearer {job.token}",
            "Accept": "application/vnd.github+json",
            "Content-Type": "application/json",
            "User-Agent": "pytest-vram",
            "X-GitHub-Api-Version": "2022-11-28",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = f"GitHub answered {error.code} to {method} {url}"
        if error.code in (401, 403, 404):
            raise CommentError(
                f"{said}: the token may not write comments. Give the job `permissions: pull-requests: write`; a pull"
                " request from a fork never gets it, and has the summary of the job instead"
            ) from error
        raise CommentError(said) from error
    except (OSError, ValueError) as error:
        raise CommentError(f"GitHub cannot be reached at {url}: {error}") from error


def _event(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        event = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return event if isinstance(event, dict) else {}
