from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.ci import github

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Api(ThreadingHTTPServer):
    """GitHub, as far as comments go."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.comments: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.refuse = 0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Api

    def _answer(self, data: Any) -> None:
        self.server.calls.append(f"{self.command} {self.path} {self.headers['Authorization']}")
        self.send_response(self.server.refuse or 200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        page = int(self.path.rpartition("page=")[2])
        self._answer(self.server.comments[100 * (page - 1) : 100 * page])

    def do_POST(self) -> None:
        body = self._body()
        if not self.server.refuse:
            self.server.comments.append({"id": 1000 + len(self.server.comments), **body})
        self._answer({})

    def do_PATCH(self) -> None:
        number, body = int(self.path.rpartition("/")[2]), self._body()
        next(one for one in self.server.comments if one["id"] == number).update(body)
        self._answer({})

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(api: Api, tmp_path: Path) -> github.Job:
    event = {"pull_request": {"number": 7, "base": {"sha": "abc", "ref": "main"}}}
    (tmp_path / "event.json").write_text(json.dumps(event))
    return github.job(
        {
            "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
            "GITHUB_API_URL": api.address,
            "GITHUB_REPOSITORY": "owner/name",
            "GITHUB_TOKEN": "secret",
            "GITHUB_WORKSPACE": str(tmp_path),
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_RUN_ID": "5",
        }
    )


def test_a_job_is_read_from_the_runners_variables(job: github.Job) -> None:
    assert (job.pull_request, job.base, job.base_name) == (7, "abc", "main")
    assert job.link == "https://github.com/owner/name/actions/runs/5"


@pytest.mark.parametrize("event", ["", "not json", "[]", '{"push": 1}', '{"pull_request": null}'])
def test_a_job_that_is_not_for_a_pull_request(tmp_path: Path, event: str) -> None:
    (tmp_path / "event.json").write_text(event)
    found = github.job({"GITHUB_EVENT_PATH": str(tmp_path / "event.json")})
    assert (found.pull_request, found.base, found.link) == (None, None, "")
    assert github.job({}).api == "https://api.github.com"


def test_one_comment_is_written_and_then_changed(api: Api, job: github.Job) -> None:
    api.comments += [{"id": i, "body": f"a person quotes\n<!-- pytest-vram -->\n{i}"} for i in range(150)]
    assert github.comment(job, "<!-- pytest-vram -->\nfirst") == "written"
    assert github.comment(job, "<!-- pytest-vram -->\nsecond") == "changed"
    assert github.comment(job, "<!-- pytest-vram other -->\nthird") == "written"
    assert [one["body"] for one in api.comments[150:]] == [
        "<!-- pytest-vram -->\nsecond",
        "<!-- pytest-vram other -->\nthird",
    ]
    assert all(call.endswith(" Bearer secret") for call in api.calls)
    assert api.calls[2].startswith("POST /repos/owner/name/issues/7/comments ")


@pytest.mark.parametrize(("code", "words"), [(403, "pull-requests: write"), (500, "answered 500")])
def test_a_refused_comment_says_why(api: Api, job: github.Job, code: int, words: str) -> None:
    api.refuse = code
    with pytest.raises(github.CommentError, match=words):
        github.comment(job, "x")


def test_no_token_and_no_network_are_told(job: github.Job) -> None:
    from dataclasses import replace

    with pytest.raises(github.CommentError, match="github-token"):
        github.comment(replace(job, token=""), "x")
    with pytest.raises(github.CommentError, match="cannot be reached"):
        github.comment(replace(job, api="http://127.0.0.1:1"), "x")
