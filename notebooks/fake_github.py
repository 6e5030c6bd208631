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

import csv
import hashlib
import math
import re
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from http.client import responses
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlencode

from starlette.requests import Request

sys.path.append(str(Path(__file__).resolve().parent))  # with `python -P`
import practice_api
from practice_api import HOST, Answer, Api, Fault, PracticeAPI, changed, made_up, number_of, path_of

if TYPE_CHECKING:  # it takes longer to import than all the rest, so only for a table
    import pandas as pd

FIGURES = Path(__file__).with_name("star_counts.csv")
TOKEN_RATE_LIMIT = 5000  # requests per window for each token
RENAMED = {"tiangolo/fastapi": "fastapi/fastapi", "samuelcolvin/pydantic": "pydantic/pydantic"}
REAL_IDS = {"fastapi/fastapi": 160919119}

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


class FakeGitHub(PracticeAPI):
    """A GitHub API on 127.0.0.1, served by a daemon thread; also a context manager.

    The arguments are those of `PracticeAPI`. `rate_limit` is for requests without a token (GitHub's
    own figure is 60); each token has 5000, counted apart.

    In its log, `repository` is the full name as requested, or the path of another route: that of a
    list's first page, however long the pages are, is "/users/dask/repos", and then comes
    "/users/dask/repos?page=2". Any other request has its path and query there. `fail` takes these
    names, and two more faults:

        "rate limit"             the primary limit: 403 or status, 0 remaining
        "secondary rate limit"   403 or status, retry-after only if among the headers
    """

    kinds = (*PracticeAPI.kinds, "rate limit", "secondary rate limit")
    column = "repository"

    def __init__(
        self, latency: float = 0.1, rate_limit: int = 5000, rate_window: float = 3600, port: int = 0
    ) -> None:
        super().__init__(GITHUB, latency, rate_limit, rate_window, port)
        with FIGURES.open(encoding="utf-8", newline="") as file:
            records = [
                row | {key: int(row[key]) for key in ("stargazers_count", "forks_count")}
                for row in csv.DictReader(file)
            ]
        records += [_made_up(f"load-test/repository-{n:02}") for n in range(1, LISTED + 1)]
        self._records = {record["full_name"].lower(): record for record in records}
        self._records |= {f"/repositories/{_id(r['full_name'])}": r for r in records}

    @property
    def repositories(self) -> pd.DataFrame:
        """The real figures: full_name, stargazers_count, forks_count, language, as_of."""
        import pandas as pd

        return pd.read_csv(FIGURES, encoding="utf-8")

    def fail(self, repository: str, kind: str | None = None, **fault) -> None:
        if "/" not in repository and repository != "*":
            raise ValueError(f'repository must read "owner/name", not {repository!r}')
        super().fail(repository, kind, **fault)

    fail.__doc__ = PracticeAPI.fail.__doc__

    def number(self, name: str) -> int:
        record = None if name in self.numbers else self._records.get(name.lower())
        return record["stargazers_count"] if record else super().number(name)

    def name_of(self, request: Request) -> str:
        path = path_of(request)
        match [unquote(part) for part in path.split("/")]:
            case ["", "repos", owner, name] if owner and name:
                return f"{owner}/{name}"
            case ["", "users" | "orgs" as kind, owner, "repos"]:
                page = _asked(request, "page")
                return f"/{kind}/{owner}/repos" + (f"?page={page}" if page > 1 else "")
            case ["", "" | "rate_limit"] | ["", "repositories", _]:
                return path
        return practice_api.address_of(request)

    def answer(self, request: Request, name: str, fault: Fault) -> Answer:
        if not request.headers.get("user-agent"):
            plain_text = {"content-type": "text/plain; charset=utf-8"}
            return Answer(403, MESSAGES["user-agent"], plain_text)
        if _token(request) is None:
            return self.error(401)
        if request.method not in ("GET", "HEAD"):
            return self.error(404)
        if name == "/":
            return Answer(200, {"repository_url": f"{self._url}/repos/{{owner}}/{{repo}}"})
        if name == "/rate_limit":
            return self._rate_limit_answer(request)
        if new := RENAMED.get(name.lower()):
            return self.redirect(301, f"{self._url}/repositories/{_id(new)}")
        answer = self._one(request, name) or self._list(request, name) or self.error(404)
        if answer.status == 200:
            answer.body = changed(answer.body, fault.fields)
            _tag(answer, request)
        return answer

    def _one(self, request: Request, name: str) -> Answer | None:
        """A repository."""
        record = self._records.get(name.lower())
        if re.fullmatch(r"load-test/[\w.-]+", name.lower(), re.ASCII):
            record = _made_up(name.lower())
        if record is None:
            return None
        record = record | {"stargazers_count": self.number(name)}
        updated = datetime.fromisoformat(record["as_of"]).replace(tzinfo=UTC)
        headers = {"last-modified": format_datetime(updated, usegmt=True)}
        return Answer(200, _repository(record, self._url, _token(request)), headers)

    def _list(self, request: Request, name: str) -> Answer | None:
        """A page of an owner's repositories."""
        if not (parts := re.fullmatch(r"/(?:users|orgs)/([^/]+/)repos(?:\?page=(\d+))?", name)):
            return None
        if not (owned := sorted(n for n in self._records if n.startswith(parts[1].lower()))):
            return None
        page, size = int(parts[2] or 1), min(_asked(request, "per_page") or 30, 100)
        headers = _page_links(request, self._url, page, math.ceil(len(owned) / size))
        shown = [self._records[name] for name in owned[(page - 1) * size : page * size]]
        body = [_repository(record, self._url, _token(request)) for record in shown]
        return Answer(200, changed(body, NOT_IN_LISTS), headers)

    def _rate_limit_answer(self, request: Request) -> Answer:
        token = _token(request)
        _, core = self._charge(*self._account(token), 0)
        limit = 30 if token else 10
        search = {"limit": limit, "used": 0, "remaining": limit, "reset": int(time.time()) + 60}
        return Answer(200, {"resources": {"core": core, "search": search}, "rate": core})

    def error(self, status: int, headers: Mapping[str, object] | None = None) -> Answer:
        """GitHub's JSON body for a status."""
        body: dict[str, object] = {
            "message": MESSAGES.get(status) or responses.get(status, "Error")
        }
        if status == 429 or (status == 403 and "retry-after" in map(str.lower, headers or ())):
            return _secondary_limit(status)
        if status == 451:
            notice = "https://github.com/github/dmca/blob/master/synthetic.md"
            block = {"reason": "dmca", "created_at": "2026-01-24T00:00:00Z", "html_url": notice}
            body["block"] = block
        elif status < 500:
            body |= {"documentation_url": DOCS, "status": str(status)}
        return Answer(status, body)

    def redirect(self, status: int, location: str) -> Answer:
        body = {"message": responses.get(status), "url": location, "documentation_url": DOCS}
        return Answer(status, body, {"location": location})

    def refused(self, request: Request, rate: dict[str, int]) -> Answer:
        return _primary_limit(403, _token(request))

    def instead_of(self, usual: Answer, fault: Fault, request: Request) -> Answer:
        if fault.kind == "rate limit":
            return _primary_limit(fault.status or 403, _token(request))
        if fault.kind == "secondary rate limit":
            return _secondary_limit(fault.status or 403)
        return super().instead_of(usual, fault, request)

    def account(self, request: Request, answer: Answer) -> tuple[str, int, int]:
        token = _token(request)
        free = path_of(request) == "/rate_limit" or not request.headers.get("user-agent")
        free |= answer.status == 304 and bool(token)
        return *self._account(token), 0 if free else 1

    def _account(self, token: str | None) -> tuple[str, int]:
        return token or "", TOKEN_RATE_LIMIT if token else self.rate_limit

    def headers(self, rate: dict[str, int]) -> dict[str, str]:
        return {
            "server": "github.com",
            "x-github-media-type": "github.v3; format=json",
            "x-github-api-version-selected": "2022-11-28",
            "x-github-request-id": uuid.uuid4().hex.upper(),
            "x-ratelimit-resource": "core",
            **{f"x-ratelimit-{name}": str(value) for name, value in rate.items()},
        }


GITHUB = Api(
    path="/repos/{name}",
    answer=lambda name, number: {"full_name": name, "stargazers_count": number},
    line="{name}: {number} stars",
    variable="GITHUB_API_URL",
    limit="github-api",
    name="load-test/repository-{}".format,
    refusal=403,
    server=FakeGitHub,
)


# What GitHub's answers say


def _primary_limit(status: int, token: str | None) -> Answer:
    who = f"user ID {number_of(token) % 10**8}." if token else f"{HOST}.{MESSAGES['good news']}"
    body = {"message": f"API rate limit exceeded for {who}", "documentation_url": LIMIT_DOCS}
    return Answer(status, body)


def _secondary_limit(status: int) -> Answer:
    url = f"{LIMIT_DOCS}#about-secondary-rate-limits"
    return Answer(status, {"message": MESSAGES["secondary"], "documentation_url": url})


def _repository(record: Mapping[str, Any], base: str, token: str | None) -> dict[str, Any]:
    """GitHub's full repository object for a row of star_counts.csv."""
    full_name, as_of = record["full_name"], record["as_of"]
    owner, name = full_name.split("/")
    number, updated = number_of(full_name), f"{as_of}T00:00:00Z"
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
    return repository


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
    return {
        "full_name": full_name,
        "stargazers_count": made_up(full_name),
        "forks_count": number_of(full_name) % 10_007,
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
        f'<{base}{path_of(request)}?{urlencode({**request.query_params, "page": n})}>; rel="{rel}"'
        for rel, n, there in (
            ("prev", min(page - 1, pages), page > 1),
            ("next", page + 1, page < pages),
            ("last", pages, page != pages),
            ("first", 1, page > 1),
        )
        if there
    ]
    return {"link": ", ".join(links)} if links else {}


def _tag(answer: Answer, request: Request) -> None:
    """Give an answer its ETag; it has no body if that is the one that the client has."""
    etag = f'"{hashlib.sha256(answer.encode()).hexdigest()}"'
    answer.headers |= {
        "cache-control": f"{'private' if _token(request) else 'public'}, max-age=60, s-maxage=60",
        "etag": f"W/{etag}",
    }
    known = re.findall(r'"[^"]*"|\*', request.headers.get("if-none-match", ""))
    if etag in known or "*" in known:
        answer.status = 304


def _id(name: str) -> int:
    return REAL_IDS.get(name.lower(), 10**9 + number_of(name) % 10**9)


# Requests


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


def main() -> int:
    parser = practice_api.parser_for("A practice GitHub API on 127.0.0.1.", "OWNER/NAME", 60)
    return practice_api.serve(parser, parser.parse_args(), GITHUB, "pipeline.py")


if __name__ == "__main__":
    sys.exit(main())
