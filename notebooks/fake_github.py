"""A practice GitHub API on 127.0.0.1: real HTTP, no network, faults on demand.

This is a *fake*: a working server that takes shortcuts. It answers `GET /repos/{owner}/{repo}`,
`/repositories/{id}`, `/users/{owner}/repos`, `/orgs/{owner}/repos`, `/rate_limit` and `/` as
api.github.com does, with the same fields, headers, pages, rate limits, conditional requests,
redirects of renamed repositories and error bodies.

Real: the names, stars, forks and languages in star_counts.csv (as GitHub gave them on the date in
`as_of`), the two renames in RENAMED and the id in REAL_IDS.
Synthetic: everything else, such as ids, open issues, subscribers, sizes, descriptions, licenses
and dates, and all about the owner `load-test`, who has a repository of any name you ask for, and
45 in the list.
Shortcuts: one API version, no compression; every token is valid unless it begins with "bad"; lists
are sorted by name, whatever else is asked, and link to their pages by the owner's name, not the id.

In a notebook: `github = FakeGitHub().start()`, then send requests to `github.url`.
In a terminal: `python fake_github.py --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.client import responses
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlencode

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:  # it takes longer to import than all the rest, so only for a table
    import pandas as pd

HOST = "127.0.0.1"
FIGURES = Path(__file__).with_name("star_counts.csv")
TOKEN_RATE_LIMIT = 5000  # requests per window for each token
RENAMED = {"tiangolo/fastapi": "fastapi/fastapi", "samuelcolvin/pydantic": "pydantic/pydantic"}
REAL_IDS = {"fastapi/fastapi": 160919119}

FAULT_KINDS = ("reset", "truncated", "rate limit", "secondary rate limit")
LISTED = 45  # repositories of `load-test` in its list

DOCS = "https://docs.github.com/rest"
LIMIT_DOCS = f"{DOCS}/using-the-rest-api/rate-limits-for-the-rest-api"
SORRY = "Sorry about that. Please try resubmitting your request and contact us if the problem"
MESSAGES = {
    401: "Bad credentials",
    403: "Resource not accessible by personal access token",
    451: "Repository access blocked",
    500: "Server Error",
    502: "Server Error",
    503: f"No server is currently available to service your request. {SORRY} persists.",
    504: f"We couldn't respond to your request in time. {SORRY} persists.",
    "good news": " (But here's the good news: Authenticated requests get a higher rate limit. "
    "Check out the documentation for more details.)",
    "secondary": "You have exceeded a secondary rate limit. "
    "Please wait a few minutes before you try again.",
    "user-agent": "Request forbidden by administrative rules. "
    "Please make sure your request has a User-Agent header.\n",
}

# `name:path` stands for the field `name_url`; without a path it is /name.
REPOSITORY_LINKS = """
    archive:/{archive_format}{/ref} assignees:/assignees{/user} blobs:/git/blobs{/sha}
    branches:/branches{/branch} collaborators:/collaborators{/collaborator}
    comments:/comments{/number} commits:/commits{/sha} compare:/compare/{base}...{head}
    contents:/contents/{+path} contributors deployments downloads events forks
    git_commits:/git/commits{/sha} git_refs:/git/refs{/sha} git_tags:/git/tags{/sha} hooks
    issue_comment:/issues/comments{/number} issue_events:/issues/events{/number}
    issues:/issues{/number} keys:/keys{/key_id} labels:/labels{/name} languages merges
    milestones:/milestones{/number} notifications:/notifications{?since,all,participating}
    pulls:/pulls{/number} releases:/releases{/id} stargazers statuses:/statuses/{sha}
    subscribers subscription tags teams trees:/git/trees{/sha}
"""
NOT_IN_LISTS = dict.fromkeys(("network_count", "subscribers_count", "temp_clone_token"), ...)
USER_LINKS = """
    followers following:/following{/other_user} gists:/gists{/gist_id} organizations:/orgs
    starred:/starred{/owner}{/repo} subscriptions repos events:/events{/privacy} received_events
"""


class FakeGitHub:
    """A GitHub API on 127.0.0.1, served by a daemon thread; also a context manager.

    latency: seconds each answer takes; answers overlap.
    rate_limit: requests per window without a token (GitHub's own figure is 60). Each token has
        5000, counted apart.
    rate_window: seconds; a window begins with the first request charged to it.
    port: 0 takes any free port.

    `latency`, `rate_limit` and `rate_window` can be set at any time. Raises ValueError for
    arguments that make no sense. `on_request`, if set, is called in the server's thread with a
    line for each request, such as "GET /repos/dask/dask 200".
    """

    def __init__(
        self, latency: float = 0.1, rate_limit: int = 5000, rate_window: float = 3600, port: int = 0
    ) -> None:
        _check(0 <= latency < math.inf, f"latency must be 0 seconds or more, not {latency}")
        _check(rate_limit >= 0, f"rate_limit must be 0 requests or more, not {rate_limit}")
        _check(0 < rate_window < math.inf, f"rate_window must be over 0 s, not {rate_window}")
        _check(0 <= port <= 65535, f"port must be from 0 to 65535, not {port}")
        self.latency, self.rate_limit, self.rate_window = latency, rate_limit, rate_window
        self.on_request: Callable[[str], None] | None = None
        self._settings = latency, rate_limit, rate_window
        self._port = port
        self._url = ""
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        with FIGURES.open(encoding="utf-8", newline="") as file:
            records = [
                row | {key: int(row[key]) for key in ("stargazers_count", "forks_count")}
                for row in csv.DictReader(file)
            ]
        records += [_made_up(f"load-test/repository-{n:02}") for n in range(1, LISTED + 1)]
        self._records = {record["full_name"].lower(): record for record in records}
        self._records |= {f"/repositories/{_id(r['full_name'])}": r for r in records}
        self._lock = threading.Lock()  # guards the three below
        self._log: list[_Row] = []
        self._faults: dict[str, deque[_Fault]] = {}
        self._windows: dict[str, tuple[float, int]] = {}  # by token: began (epoch s), used

    def start(self) -> Self:
        """Serve; return once requests are answered. Does nothing if serving already.

        Raises OSError if the port cannot be had.
        """
        if self._thread is not None:
            return self
        # With TCP by name, or asyncio does not turn Nagle's algorithm off.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if os.name == "posix":  # on Windows this option would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, self._port))
            listener.listen()  # two may bind the same port at the same moment, but not listen
        except OSError as error:
            listener.close()
            raise OSError(
                f"Cannot listen on {HOST}:{self._port} ({error.strerror}): "
                "choose another port, or 0 for any free one."
            ) from None
        config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,  # longer than clients keep an idle connection
            timeout_graceful_shutdown=1,
        )
        self._url = f"http://{HOST}:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=_run, args=(self._server, listener), daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._thread = None
                raise RuntimeError("The server ended before it could answer.")
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        """Stop serving and wait for the thread to end. Does nothing if not serving."""
        if self._thread is not None and self._server is not None:
            self._server.should_exit = True
            self._thread.join()
        self._thread = self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base URL, no trailing slash. Raises RuntimeError if not serving."""
        if self._thread is None:
            raise RuntimeError("Not serving: call start() first.")
        return self._url

    @property
    def repositories(self) -> pd.DataFrame:
        """The real figures: full_name, stargazers_count, forks_count, language, as_of."""
        import pandas as pd

        return pd.read_csv(FIGURES, encoding="utf-8")

    @property
    def requests(self) -> pd.DataFrame:
        """One row per request since the last reset, in order of arrival.

        time: seconds since the first request arrived.
        repository: full name as asked, or the path of any other request, without its query. Only
            the pages of a list have names of their own: "/users/dask/repos" is the first one,
            however long the pages are, then "/users/dask/repos?page=2". `fail` takes these names.
        status: 0 if the connection was dropped on purpose, if the client hung up before the
            answer, or while the request is under way.
        duration: seconds from arrival to the end of the answer (to now if under way).
        remaining: what the rate limit has left after this request, whatever the answer says.
        fault: whether a fault made or changed the answer. It is False for each refusal by the rate
            limit itself, and True for a refusal that `fail` asked for.
        """
        import pandas as pd

        with self._lock:
            rows = list(self._log)
        now = time.perf_counter()
        first = rows[0].arrived if rows else now
        columns = {
            "time": pd.Series([r.arrived - first for r in rows], dtype="float64"),
            "repository": pd.Series([r.repository for r in rows], dtype="str"),
            "status": pd.Series([r.status for r in rows], dtype="int64"),
            "duration": pd.Series([(r.ended or now) - r.arrived for r in rows], dtype="float64"),
            "remaining": pd.Series([r.remaining for r in rows], dtype="int64"),
            "fault": pd.Series([r.fault for r in rows], dtype="bool"),
        }
        return pd.DataFrame(columns)

    @property
    def in_flight_max(self) -> int:
        """Largest number of requests under way at the same time since the last reset."""
        with self._lock:
            rows = list(self._log)
        changes = [(row.arrived, 1) for row in rows]
        changes += [(row.ended, -1) for row in rows if row.ended is not None]
        return max(accumulate(change for _, change in sorted(changes)), default=0)

    def reset(self) -> None:
        """Empty the log, forget faults and rate windows, restore the constructor's settings."""
        with self._lock:
            self.latency, self.rate_limit, self.rate_window = self._settings
            self._log, self._faults, self._windows = [], {}, {}

    def mend(self) -> None:
        """Forget the faults that are still to come; the log and the rate counters stay."""
        with self._lock:
            self._faults.clear()

    def fail(
        self,
        repository: str,
        kind: str | None = None,
        *,
        times: int | None = 1,
        status: int | None = None,
        headers: Mapping[str, object] | None = None,
        latency: float = 0.0,
        location: str | None = None,
        html: bool = False,
        body: object = None,
        fields: Mapping[str, object] | None = None,
    ) -> None:
        """Make the next `times` answers for a repository go wrong; None means until reset().

        repository: "owner/name", or a path as the log shows it ("/rate_limit",
            "/users/dask/repos", "/users/dask/repos?page=2"), in any case

        A repository's faults are used up in the order given, so what follows one with times=None
        never comes. They can be combined, as in `fail(name, status=503, latency=2)`. Raises
        ValueError for a fault that cannot be.

        Instead of the usual answer, whatever that would have been:
            status=503               GitHub's JSON body for this status (200 to 599)
            status=503, html=True    an HTML page; without a status, 200
            location="https://…"     a redirect: 301, or 302, 307 … if that is the status
            "rate limit"             the primary limit: 403 or status, 0 remaining
            "secondary rate limit"   403 or status, retry-after only if among the headers
            body='{"id": 1'          200 or status with this body: str and bytes are sent as they
                                     are (nothing, no JSON, half of it), all else as JSON
        The usual answer, changed:
            fields={"stargazers_count": None}   other values in a repository, or in each of a list;
                                                `...` drops a field
            headers={"retry-after": 2}          more headers; None drops one
            latency=5                           seconds on top of the usual
        No answer:
            "reset"                  the connection is reset before the answer
            "truncated"              the connection is closed halfway through the body
        """
        headers, fields = dict(headers or {}), dict(fields or {})
        fault = _Fault(kind, times, status, headers, latency, location, html, body, fields)
        _check("/" in repository, f'repository must read "owner/name", not {repository!r}')
        known = kind is None or kind in FAULT_KINDS
        _check(known, f"kind must be one of {FAULT_KINDS}, not {kind!r}")
        _check(times is None or times >= 1, f"times must be 1 or more, or None, not {times}")
        _check(status is None or 200 <= status <= 599, f"status must be 200 to 599, not {status}")
        _check(0 <= latency < math.inf, f"latency must be 0 seconds or more, not {latency}")
        _check(fault != _Fault(times=times), "say what should go wrong, such as status=503")
        with self._lock:
            self._faults.setdefault(repository.lower(), deque()).append(fault)

    # The server's thread

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        request = Request(scope, receive)
        with self._lock:
            row, fault, response = self._arrive(request)
        try:
            async with asyncio.timeout(self.latency + fault.latency):
                await _disconnected(receive)  # only if the client gives up waiting
        except TimeoutError:
            if fault.kind in ("reset", "truncated"):
                await _drop(request, response, send, reset=fault.kind == "reset")
            else:
                row.status = response.status_code
                await response(scope, receive, send)
        except asyncio.CancelledError:  # stop() does not wait for long
            request.state.transport.abort()
            raise
        finally:
            row.ended = time.perf_counter()
            if self.on_request is not None:
                self.on_request(f"{request.method} {_path(request)} {row.status}")

    def _arrive(self, request: Request) -> tuple[_Row, _Fault, Response]:
        """Log a request, charge it and prepare its answer; the caller holds the lock."""
        path = _path(request)
        match [unquote(part) for part in path.split("/")]:
            case ["", "repos", owner, name] if owner and name:
                repository = f"{owner}/{name}"
            case ["", "users" | "orgs" as kind, owner, "repos"]:
                page = _asked(request, "page")
                repository = f"/{kind}/{owner}/repos" + (f"?page={page}" if page > 1 else "")
            case _:
                repository = path
        fault = self._next_fault(repository)
        token = _token(request)
        usual = self._answer(request, repository, token, fault)
        answer = fault.instead_of(usual, token)
        free = path == "/rate_limit" or not request.headers.get("user-agent")
        free |= answer.status == 304 and bool(token)
        within_limit, rate = self._charge(token, 0 if free else 1)
        if refused := answer is usual and not within_limit:
            answer = _primary_limit(403, token)
        remaining = int(rate["x-ratelimit-remaining"])
        row = _Row(repository, remaining, fault=fault != _Fault() and not refused)
        self._log.append(row)
        if fault.kind == "rate limit":
            rate |= {"x-ratelimit-remaining": "0", "x-ratelimit-used": rate["x-ratelimit-limit"]}
        return row, fault, _response(answer, rate, fault)

    def _next_fault(self, repository: str) -> _Fault:
        """Take a fault from the repository's queue; one without effect if there is none."""
        queue = self._faults.get(repository.lower())
        if not queue:
            return _Fault()
        fault = queue[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                queue.popleft()
        return fault

    def _charge(self, token: str | None, cost: int) -> tuple[bool, dict[str, str]]:
        """Charge a token's window: whether that is within the limit, and the five headers."""
        now = time.time()
        limit = TOKEN_RATE_LIMIT if token else self.rate_limit
        began, used = self._windows.get(token or "", (now, 0))
        if now >= began + self.rate_window:
            began, used = now, 0
        within_limit = used + cost <= limit or cost == 0
        if cost and within_limit:
            used += cost
            self._windows[token or ""] = began, used
        rate = {
            "limit": limit,
            "remaining": max(0, limit - used),
            "used": used,
            "reset": math.ceil(began + self.rate_window),
            "resource": "core",
        }
        return within_limit, {f"x-ratelimit-{name}": str(value) for name, value in rate.items()}

    def _answer(
        self, request: Request, repository: str, token: str | None, fault: _Fault
    ) -> _Answer:
        """What a request within the rate limit gets."""
        name = repository.lower()
        if not request.headers.get("user-agent"):
            plain_text = {"content-type": "text/plain; charset=utf-8"}
            return _Answer(403, MESSAGES["user-agent"], plain_text)
        if token is None:
            return _error(401)
        if request.method not in ("GET", "HEAD"):
            return _error(404)
        if repository == "/":
            return _Answer(200, {"repository_url": f"{self._url}/repos/{{owner}}/{{repo}}"})
        if repository == "/rate_limit":
            return self._rate_limit_answer(token)
        if name in RENAMED:
            return _redirect(301, f"{self._url}/repositories/{_id(RENAMED[name])}")
        record = self._records.get(name)
        if re.fullmatch(r"load-test/[\w.-]+", name, re.ASCII):
            record = _made_up(name)
        a_list = re.fullmatch(r"/(?:users|orgs)/([^/]+/)repos(?:\?page=(\d+))?", repository)
        owned = [n for n in self._records if a_list and n.startswith(a_list[1].lower())]
        if record is not None:
            updated = datetime.fromisoformat(record["as_of"]).replace(tzinfo=UTC)
            headers = {"last-modified": format_datetime(updated, usegmt=True)}
            body: object = _repository(record, self._url, token, fault.fields)
        elif a_list and owned:
            page, size = int(a_list[2] or 1), min(_asked(request, "per_page") or 30, 100)
            headers = _page_links(request, self._url, page, math.ceil(len(owned) / size))
            shown = [self._records[n] for n in sorted(owned)[(page - 1) * size : page * size]]
            fields = NOT_IN_LISTS | fault.fields
            body = [_repository(record, self._url, token, fields) for record in shown]
        else:
            return _error(404)
        answer = _Answer(200, body, headers)
        etag = f'"{hashlib.sha256(answer.encode()).hexdigest()}"'
        answer.headers |= {
            "cache-control": f"{'private' if token else 'public'}, max-age=60, s-maxage=60",
            "etag": f"W/{etag}",
        }
        known = re.findall(r'"[^"]*"|\*', request.headers.get("if-none-match", ""))
        if etag in known or "*" in known:
            answer.status = 304
        return answer

    def _rate_limit_answer(self, token: str) -> _Answer:
        _, rate = self._charge(token, 0)
        core = {k: int(rate[f"x-ratelimit-{k}"]) for k in ("limit", "used", "remaining", "reset")}
        limit = 30 if token else 10
        search = {"limit": limit, "used": 0, "remaining": limit, "reset": int(time.time()) + 60}
        return _Answer(200, {"resources": {"core": core, "search": search}, "rate": core})


@dataclass
class _Row:
    """A line of the request log; times in seconds of `time.perf_counter`."""

    repository: str
    remaining: int
    fault: bool
    arrived: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    status: int = 0


@dataclass
class _Answer:
    """An answer before it becomes HTTP; a body other than str and bytes is sent as JSON."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        if self.status in (204, 304):
            return b""
        if isinstance(self.body, bytes):
            return self.body
        if isinstance(self.body, str):
            return self.body.encode()
        return json.dumps(self.body, separators=(",", ":")).encode()


@dataclass
class _Fault:
    """The arguments of `FakeGitHub.fail`; without any, it has no effect."""

    kind: str | None = None
    times: int | None = 1
    status: int | None = None
    headers: dict[str, object] = field(default_factory=dict)
    latency: float = 0.0
    location: str | None = None
    html: bool = False
    body: object = None
    fields: dict[str, object] = field(default_factory=dict)

    def instead_of(self, usual: _Answer, token: str | None) -> _Answer:
        """The answer that takes the usual one's place, or the usual one itself."""
        if self.html:
            page = f"<!DOCTYPE html>\n<title>GitHub</title>\n<h1>{self.status or 200}</h1>\n"
            return _Answer(self.status or 200, page, {"content-type": "text/html; charset=utf-8"})
        if self.body is not None:
            return _Answer(self.status or 200, self.body)
        if self.location is not None:
            return _redirect(self.status or 301, self.location)
        if self.kind == "rate limit":
            return _primary_limit(self.status or 403, token)
        if self.kind == "secondary rate limit":
            return _secondary_limit(self.status or 403)
        return usual if self.status in (None, 200) else _error(self.status)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# From an answer to HTTP


def _response(answer: _Answer, rate: dict[str, str], fault: _Fault) -> Response:
    headers: dict[str, object] = {
        "server": "github.com",
        "x-github-media-type": "github.v3; format=json",
        "x-github-api-version-selected": "2022-11-28",
        "x-github-request-id": uuid.uuid4().hex.upper(),
    }
    if answer.status not in (204, 304):
        headers["content-type"] = "application/json; charset=utf-8"
    headers |= rate | answer.headers | {k.lower(): v for k, v in fault.headers.items()}
    kept = {name: str(value) for name, value in headers.items() if value is not None}
    return Response(answer.encode(), answer.status, kept)


# What GitHub's answers say


def _error(status: int) -> _Answer:
    """GitHub's JSON body for a status."""
    body: dict[str, object] = {"message": MESSAGES.get(status) or responses.get(status, "Error")}
    if status == 429:
        return _secondary_limit(status)
    if status == 451:
        notice = "https://github.com/github/dmca/blob/master/synthetic.md"
        block = {"reason": "dmca", "created_at": "2026-01-24T00:00:00Z", "html_url": notice}
        body["block"] = block
    elif status < 500:
        body |= {"documentation_url": DOCS, "status": str(status)}
    return _Answer(status, body)


def _redirect(status: int, location: str) -> _Answer:
    body = {"message": responses.get(status), "url": location, "documentation_url": DOCS}
    return _Answer(status, body, {"location": location})


def _primary_limit(status: int, token: str | None) -> _Answer:
    who = f"user ID {_number(token) % 10**8}." if token else f"{HOST}.{MESSAGES['good news']}"
    body = {"message": f"API rate limit exceeded for {who}", "documentation_url": LIMIT_DOCS}
    return _Answer(status, body)


def _secondary_limit(status: int) -> _Answer:
    url = f"{LIMIT_DOCS}#about-secondary-rate-limits"
    return _Answer(status, {"message": MESSAGES["secondary"], "documentation_url": url})


def _repository(
    record: Mapping[str, Any], base: str, token: str, fields: Mapping[str, object]
) -> dict[str, Any]:
    """GitHub's full repository object for a row of star_counts.csv, with other `fields`."""
    full_name, as_of = record["full_name"], record["as_of"]
    owner, name = full_name.split("/")
    number, updated = _number(full_name), f"{as_of}T00:00:00Z"
    api, html = f"{base}/repos/{full_name}", f"https://github.com/{full_name}"
    license_ = {"key": "other", "name": "Other", "spdx_id": "NOASSERTION", "url": None}
    about = f"Practice data: stars, forks and language are real ({as_of}), the rest is synthetic."
    repository = {
        "id": _id(full_name),
        "node_id": f"R_{number:012x}",
        "name": name,
        "full_name": full_name,
        "owner": _owner(owner, base),
        "description": record.get("description", about),
        "url": api,
        **_links(api, REPOSITORY_LINKS),
        "html_url": html,
        "git_url": f"git://github.com/{full_name}.git",
        "ssh_url": f"git@github.com:{full_name}.git",
        "clone_url": f"{html}.git",
        "svn_url": html,
        "created_at": f"{2010 + number % 10}-01-01T00:00:00Z",
        "updated_at": updated,
        "pushed_at": updated,
        "size": number % 500_000,
        "language": record["language"],
        "license": license_ | {"node_id": "L_000000000000"} if number % 2 else None,
        "topics": [],
        "visibility": "public",
        "default_branch": "main",
        "subscribers_count": record["stargazers_count"] // 100,
    }
    for value, keys in (
        (record["stargazers_count"], "stargazers_count watchers_count watchers"),
        (record["forks_count"], "forks_count forks network_count"),
        (number % 2000, "open_issues_count open_issues"),
        (True, "has_issues has_projects has_wiki has_downloads allow_forking"),
        (False, "private fork archived disabled is_template has_pages has_discussions"),
        (False, "web_commit_signoff_required"),
        (None, "homepage mirror_url temp_clone_token"),
    ):
        repository |= dict.fromkeys(keys.split(), value)
    if token:
        rights = dict.fromkeys(("admin", "maintain", "push", "triage"), False)
        repository["permissions"] = rights | {"pull": True}
    return {key: value for key, value in (repository | fields).items() if value is not ...}


def _owner(login: str, base: str) -> dict[str, Any]:
    """GitHub's simple user object."""
    api, number = f"{base}/users/{login}", _id(login)
    return {
        "login": login,
        "id": number,
        "node_id": f"O_{number:012x}",
        "avatar_url": f"https://avatars.githubusercontent.com/u/{number}?v=4",
        "gravatar_id": "",
        "url": api,
        "html_url": f"https://github.com/{login}",
        **_links(api, USER_LINKS),
        "type": "Organization",
        "user_view_type": "public",
        "site_admin": False,
    }


def _made_up(full_name: str) -> dict[str, Any]:
    """A row as in star_counts.csv, always the same for the same name."""
    number = _number(full_name)
    return {
        "full_name": full_name,
        "stargazers_count": number % 100_000,
        "forks_count": number % 10_007,
        "language": "Python",
        "as_of": "2026-01-24",
        "description": "Synthetic repository for load tests: all its figures are made up.",
    }


def _links(api: str, names: str) -> dict[str, str]:
    pairs = (link.partition(":") for link in names.split())
    return {f"{name}_url": api + (path or f"/{name}") for name, _, path in pairs}


def _page_links(request: Request, base: str, page: int, pages: int) -> dict[str, str]:
    """GitHub's header with the addresses of a list's other pages, if there are any."""
    links = [
        f'<{base}{_path(request)}?{urlencode({**request.query_params, "page": n})}>; rel="{rel}"'
        for rel, n, there in (
            ("prev", min(page - 1, pages), page > 1),
            ("next", page + 1, page < pages),
            ("last", pages, page != pages),
            ("first", 1, page > 1),
        )
        if there
    ]
    return {"link": ", ".join(links)} if links else {}


def _number(text: str) -> int:
    """A number below 2**48 which is always the same for the same text."""
    return int(hashlib.sha256(text.lower().encode()).hexdigest()[:12], 16)


def _id(name: str) -> int:
    return REAL_IDS.get(name.lower(), 10**9 + _number(name) % 10**9)


# Requests and connections


def _path(request: Request) -> str:
    """The path as sent: %2F is no slash."""
    return bytes(request.scope["raw_path"]).decode()


def _asked(request: Request, name: str) -> int:
    """A number in the query, as GitHub reads it: 0 if it is none."""
    digits = re.match(r"\d{0,9}", request.query_params.get(name, ""), re.ASCII)
    return int(digits[0] or 0)


def _token(request: Request) -> str | None:
    """The token, "" if there is none, None if it is not valid."""
    if "authorization" not in request.headers:
        return ""
    scheme, _, token = request.headers["authorization"].partition(" ")
    valid = scheme.lower() in ("bearer", "token") and re.match(r"(?!bad)\S", token, re.IGNORECASE)
    return token if valid else None


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with the connection at hand as `request.state.transport`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drop(request: Request, response: Response, send: Send, *, reset: bool) -> None:
    """Reset the connection before the answer, or close it halfway through the answer's body."""
    transport: asyncio.Transport = request.state.transport
    if reset:  # to linger for no time makes closing a reset
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        connection = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # macOS: the client has just gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    else:
        start = {"status": response.status_code, "headers": response.raw_headers}
        half = bytes(response.body[: len(response.body) // 2])
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": half, "more_body": True})
        transport.close()
    await _disconnected(request.receive)


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    # The same kind of event loop on every system, so that dropped connections look the same.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(server.serve(sockets=[listener]))


# The script


def _fault_option(text: str) -> tuple[str, int, int]:
    parts = re.fullmatch(r"([^/=\s]+/[^/=\s]+)=([2-5]\d\d)(?:x([1-9]\d*))?", text, re.ASCII)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} does not read OWNER/NAME=STATUS[xTIMES]")
    return parts[1], int(parts[2]), int(parts[3] or 1)


def main() -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code is 1 if the port cannot be had."""
    parser = argparse.ArgumentParser(description="A practice GitHub API on 127.0.0.1.")
    for name, kind, default, text in (
        ("--port", int, 8787, "0 takes any free one"),
        ("--latency", float, 0.0, "seconds each answer takes"),
        ("--rate-limit", int, 60, "requests per window without a token"),
        ("--rate-window", float, 3600.0, "seconds"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (%(default)s)")
    parser.add_argument(
        "--fail",
        type=_fault_option,
        action="append",
        default=[],
        metavar="OWNER/NAME=STATUS[xTIMES]",
        help="answer the first TIMES (1) requests for a repository like this; can be repeated",
    )
    args = parser.parse_args()
    try:
        github = FakeGitHub(args.latency, args.rate_limit, args.rate_window, args.port)
    except ValueError as error:
        parser.error(str(error))
    for repository, status, times in args.fail:
        github.fail(repository, status=status, times=times)

    def show(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(f"{text}\n", end="", flush=True)  # in one piece: two threads call this

    github.on_request = show
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        url = github.start().url
        show(
            f"{url}\nIn another terminal: GITHUB_API_URL={url} python pipeline.py\n"
            f'(PowerShell: $env:GITHUB_API_URL="{url}"; cmd: set GITHUB_API_URL={url})'
        )
        while True:
            time.sleep(60)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        github.stop()
        return 0


if __name__ == "__main__":
    sys.exit(main())
