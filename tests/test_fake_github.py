"""The practice API, over real HTTP: does it behave as api.github.com does, and fail as told?"""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import httpx
import pandas as pd
import pytest
from pydantic import AwareDatetime, ConfigDict, Field, create_model

import fake_github
from fake_github import FakeGitHub

PYDANTIC = "pydantic/pydantic"
PATH = f"/repos/{PYDANTIC}"
RATE_HEADERS = {f"x-ratelimit-{h}" for h in ("limit", "remaining", "used", "reset", "resource")}
RESOURCE = "x-ratelimit-resource"
DROPPED = (httpx.ReadError, httpx.RemoteProtocolError)
TOKEN = {"authorization": "Bearer practice"}


LINKS = """
archive assignees blobs branches collaborators comments commits compare contents contributors
deployments downloads events forks git_commits git_refs git_tags hooks issue_comment issue_events
issues keys labels languages merges milestones notifications pulls releases stargazers statuses
subscribers subscription tags teams trees
"""


def required(kind, names):
    return dict.fromkeys(names.split(), (kind, ...))


# The fields that GitHub's description requires, strictly in their types.
STRICT = ConfigDict(strict=True)
Owner = create_model(
    "Owner",
    __config__=STRICT,
    **required(int, "id"),
    **required(bool, "site_admin"),
    **required(str, "login node_id type avatar_url gravatar_id url html_url followers_url"),
    **required(str, "following_url gists_url starred_url subscriptions_url organizations_url"),
    **required(str, "repos_url events_url received_events_url"),
)
License = create_model(
    "License",
    __config__=STRICT,
    **required(str, "key name node_id"),
    **required(str | None, "url spdx_id"),
)
ListedRepository = create_model(  # the 73 that an item of a list has
    "ListedRepository",
    __config__=STRICT,
    owner=Owner,
    license=License | None,
    **required(str, "".join(f" {name}_url" for name in LINKS.split())),
    **required(str, "node_id name full_name html_url url clone_url git_url ssh_url svn_url"),
    **required(str, "default_branch"),
    **required(str | None, "description mirror_url homepage language"),
    **required(int, "id forks_count forks stargazers_count watchers_count watchers size"),
    **required(int, "open_issues_count open_issues"),
    **required(bool, "private fork has_issues has_projects has_wiki has_pages has_discussions"),
    **required(bool, "archived disabled"),
    **required(Annotated[AwareDatetime, Field(strict=False)], "pushed_at created_at updated_at"),
)
Repository = create_model(  # the 75 that a repository has
    "Repository", __base__=ListedRepository, **required(int, "network_count subscribers_count")
)


@pytest.fixture(scope="module")
def server():
    with FakeGitHub(latency=0) as github:
        yield github


@pytest.fixture(scope="module")
def http():
    """One client for all: a new one takes a while, as it loads certificates."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def github(server):
    server.reset()
    return server


@pytest.fixture
def client(github, http):
    http.base_url = github.url
    return http


@pytest.fixture
def clock(monkeypatch):
    """A clock for all, standing still at 1000.25 s after the epoch until it is set."""
    times = [1000.25]
    monkeypatch.setattr(time, "time", lambda: times[-1])
    return times.append


def stars(response):
    return response.json()["stargazers_count"]


def without_user_agent(client, instead=None):
    request = client.build_request("GET", PATH)
    del request.headers["user-agent"]
    if instead is not None:
        request.headers["user-agent"] = instead
    return client.send(request)


# What a repository looks like


def test_figures_come_from_the_csv(github):
    csv = pd.read_csv(Path(fake_github.__file__).parent / "star_counts.csv")
    pd.testing.assert_frame_equal(github.repositories, csv)
    assert list(csv) == ["full_name", "stargazers_count", "forks_count", "language", "as_of"]
    assert len(csv) == csv["full_name"].nunique() == 24


def test_every_repository_has_all_fields(github, client):
    assert len(Repository.model_fields) == 75
    ids = set()
    for row in github.repositories.itertuples():
        response = client.get(f"/repos/{row.full_name}")
        assert response.status_code == 200
        body = response.json()
        repository = Repository.model_validate(body)
        api = f"{github.url}/repos/{row.full_name}"
        for name in LINKS.split():
            assert body[f"{name}_url"].startswith(f"{api}/"), name
        assert (repository.full_name, repository.url) == (row.full_name, api)
        assert f"{repository.owner.login}/{repository.name}" == row.full_name
        assert repository.html_url == f"https://github.com/{row.full_name}"
        assert repository.language == row.language
        for name in ("stargazers_count", "watchers_count", "watchers"):
            assert body[name] == row.stargazers_count
        for name in ("forks_count", "forks", "network_count"):
            assert body[name] == row.forks_count
        assert repository.open_issues == repository.open_issues_count
        assert "synthetic" in repository.description
        assert "temp_clone_token" in body
        assert body["temp_clone_token"] is None
        assert "permissions" not in body
        ids.add(repository.id)
    assert len(ids) == 24


def test_address_templates(client):
    body = client.get("/repos/dask/dask").json()
    api = body["url"]
    assert body["compare_url"] == f"{api}/compare/{{base}}...{{head}}"
    assert body["contents_url"] == f"{api}/contents/{{+path}}"
    assert body["git_refs_url"] == f"{api}/git/refs{{/sha}}"
    assert body["languages_url"] == f"{api}/languages"
    assert body["notifications_url"] == f"{api}/notifications{{?since,all,participating}}"
    assert body["ssh_url"] == "git@github.com:dask/dask.git"
    assert body["owner"]["following_url"].endswith("/users/dask/following{/other_user}")


def test_headers(client):
    response = client.get(PATH)
    expected = {
        "content-type": "application/json; charset=utf-8",
        "cache-control": "public, max-age=60, s-maxage=60",
        "last-modified": "Sat, 24 Jan 2026 00:00:00 GMT",
        "x-github-media-type": "github.v3; format=json",
        "x-github-api-version-selected": "2022-11-28",
        "server": "github.com",
        "x-ratelimit-resource": "core",
    }
    assert {name: response.headers[name] for name in expected} == expected
    assert response.headers.get_list("server") == ["github.com"]
    other = client.get(PATH)
    assert other.headers["etag"] == response.headers["etag"]
    assert other.headers["x-github-request-id"] != response.headers["x-github-request-id"]
    with_token = client.get(PATH, headers=TOKEN)
    assert with_token.headers["cache-control"].startswith("private, max-age")
    assert with_token.json()["permissions"]["pull"] is True


@pytest.mark.parametrize("name", ["prefecthq/prefect", "PREFECTHQ/PREFECT", "PrefectH%51/prefect"])
def test_names_ignore_case(client, name):
    response = client.get(f"/repos/{name}")
    assert response.json()["full_name"] == "PrefectHQ/prefect"


def test_head_has_the_headers_of_get(client):
    get, head = client.get(PATH), client.head(PATH)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "content-type"):
        assert head.headers[name] == get.headers[name]


def test_load_test_has_any_repository(client):
    one, two = (client.get(f"/repos/load-test/repository-{n}") for n in (1, 2))
    again = client.get("/repos/Load-Test/Repository-1")
    body = one.json()
    assert Repository.model_validate(body).full_name == "load-test/repository-1"
    assert "synthetic" in body["description"].lower()
    assert again.content == one.content
    assert stars(one) != stars(two)
    assert client.get("/repos/load-test/no%20name").status_code == 404


def test_root(github, client):
    assert client.get("/").json()["repository_url"] == f"{github.url}/repos/{{owner}}/{{repo}}"


# Lists of an owner's repositories


@pytest.mark.parametrize("path", ["/users/load-test/repos", "/orgs/Load-Test/repos"])
def test_list_in_pages(github, client, path):
    github.rate_limit = 10
    response = client.get(path)
    pages = [response]
    while "next" in response.links:
        response = client.get(response.links["next"]["url"])
        pages.append(response)
    repositories = [ListedRepository.model_validate(item) for page in pages for item in page.json()]
    assert [len(page.json()) for page in pages] == [30, 15]
    assert {repository.owner.login for repository in repositories} == {"load-test"}
    names = [repository.full_name for repository in repositories]
    assert names == sorted(set(names))
    assert len({repository.stargazers_count for repository in repositories}) > 40
    assert stars(client.get(f"/repos/{names[-1]}")) == repositories[-1].stargazers_count
    log = github.requests
    assert log["repository"].tolist() == [path, f"{path}?page=2", names[-1]]
    assert log["remaining"].tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    ("query", "items", "links"),
    [
        ("", 30, {"next": 2, "last": 2}),
        ("page=2", 15, {"prev": 1, "first": 1}),
        ("page=3", 0, {"prev": 2, "last": 2, "first": 1}),
        (f"page={'9' * 30}", 0, {"prev": 2, "last": 2, "first": 1}),
        ("page=0", 30, {"next": 2, "last": 2}),
        ("page=-1&per_page=-1", 30, {"next": 2, "last": 2}),
        ("page=one&per_page=many", 30, {"next": 2, "last": 2}),
        ("per_page=0", 30, {"next": 2, "last": 2}),
        ("page=2&per_page=20", 20, {"prev": 1, "next": 3, "last": 3, "first": 1}),
        ("per_page=15&page=3", 15, {"prev": 2, "first": 1}),
        ("per_page=45", 45, {}),
        ("per_page=100", 45, {}),
        ("per_page=1000&page=2", 0, {"prev": 1, "last": 1, "first": 1}),
    ],
)
def test_pages(client, query, items, links):
    response = client.get(f"/users/load-test/repos?{query}")
    assert (response.status_code, len(response.json())) == (200, items)
    pages = {rel: httpx.URL(link["url"]).params["page"] for rel, link in response.links.items()}
    assert list(pages.items()) == [(rel, str(page)) for rel, page in links.items()]


def test_link_header(github, client):
    response = client.get("/users/load-test/repos?sort=pushed&page=1&per_page=44")
    url = f"{github.url}/users/load-test/repos?sort=pushed&page=2&per_page=44"
    assert response.headers["link"] == f'<{url}>; rel="next", <{url}>; rel="last"'
    assert "link" not in client.get("/users/dask/repos").headers


def test_page_has_100_items_at_most(monkeypatch, http):
    monkeypatch.setattr(fake_github, "LISTED", 101)
    with FakeGitHub(latency=0) as github:
        response = http.get(f"{github.url}/users/load-test/repos?per_page=1000")
    assert len(response.json()) == 100
    assert response.links["next"]["url"].endswith("?per_page=1000&page=2")


def test_lists_of_real_owners(github, client):
    names = github.repositories["full_name"]
    for owner, owned in names.groupby(names.str.partition("/")[0]):
        items = client.get(f"/users/{owner.upper()}/repos").json()
        assert [item["full_name"] for item in items] == sorted(owned)
        for item in items:
            ListedRepository.model_validate(item)
            full = client.get(f"/repos/{item['full_name']}").json()
            only_there = {"network_count", "subscribers_count", "temp_clone_token"}
            assert full.keys() - item.keys() == only_there
            assert full.items() >= item.items()


def test_faults_of_lists(github, client):
    first, second = "/users/load-test/repos", "/users/load-test/repos?page=2"
    github.fail(second, status=503, times=2)
    github.fail(first.upper(), "rate limit")
    github.fail(first, fields={"stargazers_count": 7, "id": ...})
    asked = [first, second, first, second, second]
    responses = [client.get(path) for path in asked]
    assert [response.status_code for response in responses] == [403, 503, 200, 503, 200]
    assert {item["stargazers_count"] for item in responses[2].json()} == {7}
    assert all("id" not in item for item in responses[2].json())
    log = github.requests
    assert log["repository"].tolist() == asked
    assert log["fault"].tolist() == [True] * 4 + [False]


# Conditional requests


def test_etag_is_weak(client):
    paths = (PATH, "/repos/dask/dask", "/users/load-test/repos", "/users/load-test/repos?page=2")
    etags = [client.get(path).headers["etag"] for path in paths]
    assert len(set(etags)) == 4
    for etag in etags:
        assert etag.startswith('W/"')
        assert len(bytes.fromhex(etag[3:-1])) == 32


@pytest.mark.parametrize("form", ["{}", '"other", {}', 'W/"other",{}', "*"])
@pytest.mark.parametrize("weak", [True, False])
@pytest.mark.parametrize("path", [PATH, "/users/load-test/repos"])
def test_unchanged(client, path, form, weak):
    etag = client.get(path).headers["etag"]
    sent = form.format(etag if weak else etag.removeprefix("W/"))
    response = client.get(path, headers={"if-none-match": sent})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag
    assert response.headers.keys() >= RATE_HEADERS
    assert "content-type" not in response.headers


@pytest.mark.parametrize("sent", ["", '"other"', 'W/"other"', 'W/""'])
def test_changed(client, sent):
    response = client.get(PATH, headers={"if-none-match": sent})
    assert response.status_code == 200
    assert stars(response) == 26549


def test_unchanged_is_free_with_a_token_only(client):
    for headers, costs in (({}, [1, 2, 3]), (TOKEN, [1, 1, 1])):
        etag = client.get(PATH, headers=headers).headers["etag"]
        used = [1]
        for _ in range(2):
            response = client.get(PATH, headers=headers | {"if-none-match": etag})
            assert response.status_code == 304
            used.append(int(response.headers["x-ratelimit-used"]))
        assert used == costs


# Redirects, refusals, errors


@pytest.mark.parametrize(
    ("old", "new"),
    [("tiangolo/fastapi", "fastapi/fastapi"), ("SamuelColvin/pydantic", "pydantic/pydantic")],
)
def test_renamed_repository(github, client, old, new):
    response = client.get(f"/repos/{old}")
    assert response.status_code == 301
    body, location = response.json(), response.headers["location"]
    assert (body["message"], body["url"]) == ("Moved Permanently", location)
    assert "documentation_url" in body
    followed = client.get(f"/repos/{old}", follow_redirects=True).json()
    assert followed["full_name"] == new
    assert location == f"{github.url}/repositories/{followed['id']}"
    assert (followed["id"] == 160919119) == (new == "fastapi/fastapi")  # the real id


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/repos/pydantic/unknown"),
        ("GET", "/repos/pydantic/pydantic/"),
        ("GET", "/repos/pydantic/pydantic/issues"),
        ("GET", "/repos/pydantic%2Fpydantic"),
        ("GET", "/repos/pydantic"),
        ("GET", "/repos//"),
        ("GET", "/repositories/1"),
        ("GET", "/rate_limit/"),
        ("GET", "/users/nobody/repos"),
        ("GET", "/orgs/nobody/repos"),
        ("GET", "/users//repos"),
        ("GET", "/users/dask/repos/"),
        ("GET", "/users/dask%2Fdask/repos"),
        ("GET", "/users/dask/repos%3Fpage=2"),
        ("POST", "/users/dask/repos"),
        ("POST", "/repos/pydantic/pydantic"),
        ("PUT", "/repos/pydantic/pydantic"),
        ("PATCH", "/repos/pydantic/pydantic"),
        ("DELETE", "/repos/pydantic/pydantic"),
    ],
)
def test_not_found(client, method, path):
    response = client.request(method, path, content=b"{}" if method != "GET" else None)
    assert response.status_code == 404
    body = response.json()
    assert (body["message"], body["status"]) == ("Not Found", "404")
    assert body["documentation_url"].startswith("https://docs.github.com/")


@pytest.mark.parametrize("sent", [None, ""])
def test_user_agent_is_required(github, client, sent):
    response = without_user_agent(client, sent)
    assert response.status_code == 403
    assert response.headers["content-type"].startswith("text/plain")
    assert "User-Agent" in response.text
    assert github.requests["remaining"].tolist() == [5000]


@pytest.mark.parametrize("sent", ["Bearer bad", "token badtoken", "Bearer", "Basic eA=="])
def test_bad_credentials(client, sent):
    response = client.get(PATH, headers={"authorization": sent})
    assert (response.status_code, response.json()["message"]) == (401, "Bad credentials")


@pytest.mark.parametrize("sent", ["Bearer x", "token x", "bearer x"])
def test_good_credentials(github, client, sent):
    github.rate_limit = 60
    response = client.get(PATH, headers={"authorization": sent})
    assert (response.status_code, response.headers["x-ratelimit-limit"]) == (200, "5000")


def test_rate_headers_are_on_every_answer(github, client):
    github.rate_limit = 100
    for status in (401, 404, 429, 451, 500, 503):
        github.fail(PYDANTIC, status=status)
    responses = [client.get(PATH) for _ in range(6)]
    responses += [client.get("/repos/a/b"), client.get("/repos/tiangolo/fastapi")]
    responses += [client.get(PATH, headers={"if-none-match": "*"}), client.head(PATH)]
    responses += [client.get("/rate_limit"), client.get("/"), client.post("/")]
    responses += [client.get(PATH, headers={"authorization": "Bearer bad"})]
    responses += [without_user_agent(client)]
    used = []
    for response in responses:
        assert response.headers.keys() >= RATE_HEADERS
        rate = {h: int(response.headers[h]) for h in RATE_HEADERS if h != RESOURCE}
        assert rate["x-ratelimit-remaining"] + rate["x-ratelimit-used"] == 100
        assert response.headers[RESOURCE] == "core"
        used.append(rate["x-ratelimit-used"])
    assert used == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 13]


# The rate limit


def test_rate_limit(github, client):
    github.rate_limit = 2
    responses = [client.get(PATH) for _ in range(4)]
    assert [r.status_code for r in responses] == [200, 200, 403, 403]
    assert [r.headers["x-ratelimit-remaining"] for r in responses] == ["1", "0", "0", "0"]
    assert [r.headers["x-ratelimit-used"] for r in responses] == ["1", "2", "2", "2"]
    assert responses[-1].json()["message"] == (
        "API rate limit exceeded for 127.0.0.1. (But here's the good news: Authenticated requests "
        "get a higher rate limit. Check out the documentation for more details.)"
    )
    assert "rate-limits" in responses[-1].json()["documentation_url"]
    assert "retry-after" not in responses[-1].headers
    assert client.get("/repos/no/such").status_code == 403
    assert client.get(PATH, headers=TOKEN).status_code == 200
    github.rate_limit = 3
    assert client.get(PATH).status_code == 200


def test_tokens_are_counted_apart(client, monkeypatch):
    monkeypatch.setattr(fake_github, "TOKEN_RATE_LIMIT", 1)
    other = {"authorization": "Bearer other"}
    statuses = [client.get(PATH, headers=h).status_code for h in (TOKEN, TOKEN, other, {}, {})]
    assert statuses == [200, 403, 200, 200, 200]
    refused = client.get(PATH, headers=other)
    assert refused.json()["message"].startswith("API rate limit exceeded for user ID ")
    unchanged = client.get("/repos/dask/dask", headers=other | {"if-none-match": "*"})
    assert unchanged.status_code == 304  # it is free


def test_window_begins_with_the_first_charged_request(github, client, clock):
    github.rate_limit, github.rate_window = 2, 4.0

    def reset_and_remaining(path=PATH):
        headers = client.get(path).headers
        return int(headers["x-ratelimit-reset"]), int(headers["x-ratelimit-remaining"])

    assert reset_and_remaining("/rate_limit") == (1005, 2)
    clock(1002.25)
    assert reset_and_remaining() == (1007, 1)
    clock(1004.25)
    assert reset_and_remaining() == (1007, 0)
    clock(1006.24)
    assert client.get(PATH).status_code == 403
    clock(1006.25)
    assert reset_and_remaining("/rate_limit") == (1011, 2)
    assert reset_and_remaining() == (1011, 1)
    github.rate_window = 10.0
    assert reset_and_remaining() == (1017, 0)


def test_rate_limit_route_is_never_charged(github, client):
    github.rate_limit = 1
    assert client.get(PATH).status_code == 200
    for _ in range(2):
        body = client.get("/rate_limit").json()
        core = body["resources"]["core"]
        assert body["rate"] == core
        assert (core["limit"], core["remaining"], core["used"]) == (1, 0, 1)
        assert {type(core["reset"]), type(body["resources"]["search"]["limit"])} == {int}
        assert body["resources"]["search"].keys() == core.keys()
    assert client.get("/rate_limit", headers=TOKEN).json()["rate"]["limit"] == 5000


# Faults


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "Bad credentials"),
        (403, "Resource not accessible by personal access token"),
        (404, "Not Found"),
        (410, "Gone"),
        (429, "You have exceeded a secondary rate limit"),
        (451, "Repository access blocked"),
        (500, "Server Error"),
        (502, "Server Error"),
        (503, "No server is currently available to service your request."),
        (504, "We couldn't respond to your request in time."),
        (599, "Error"),
    ],
)
def test_status(github, client, status, message):
    github.fail(PYDANTIC, status=status)
    response = client.get(PATH)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert "etag" not in response.headers
    body = response.json()
    assert body["message"].startswith(message)
    assert ("documentation_url" in body) == (status < 500 and status != 451)
    assert ("block" in body) == (status == 451)
    if status == 451:
        assert body["block"].keys() == {"reason", "created_at", "html_url"}
    assert client.get(PATH).status_code == 200


@pytest.mark.parametrize("status", [204, 304])
def test_status_without_a_body(github, client, status):
    github.fail(PYDANTIC, status=status)
    response = client.get(PATH)
    assert (response.status_code, response.content) == (status, b"")
    assert client.get(PATH).status_code == 200


def test_headers_are_added_changed_and_left_out(github, client):
    github.fail(PYDANTIC, status=429, headers={"Retry-After": 2})
    github.fail(PYDANTIC, headers={"ETag": None, "x-ratelimit-remaining": "7"})
    limited, usual = client.get(PATH), client.get(PATH)
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "2")
    assert (usual.status_code, usual.headers["x-ratelimit-remaining"]) == (200, "7")
    assert "etag" not in usual.headers


@pytest.mark.parametrize("status", [None, 429])
@pytest.mark.parametrize(
    ("kind", "message", "remaining"),
    [
        ("rate limit", "API rate limit exceeded for 127.0.0.1.", ["0", "0", "4997"]),
        (
            "secondary rate limit",
            "You have exceeded a secondary rate limit. Please wait a few minutes before you try ",
            ["4999", "4998", "4997"],
        ),
    ],
)
def test_rate_limit_faults(github, client, kind, message, remaining, status):
    github.fail(PYDANTIC, kind, status=status)
    headers = {"retry-after": 60, "x-ratelimit-reset": None}
    github.fail(PYDANTIC, kind, status=status, headers=headers)
    one, two, healthy = (client.get(PATH) for _ in range(3))
    for response in (one, two):
        assert response.status_code == (status or 403)
        assert response.json()["message"].startswith(message)
    assert "retry-after" not in one.headers
    assert two.headers["retry-after"] == "60"
    assert "x-ratelimit-reset" in one.headers
    assert "x-ratelimit-reset" not in two.headers
    assert [r.headers["x-ratelimit-remaining"] for r in (one, two, healthy)] == remaining
    log = github.requests  # tells what is really left, and whose refusal it was
    assert log["remaining"].tolist() == [4999, 4998, 4997]
    assert log["fault"].tolist() == [True, True, False]


def test_redirect_to_anywhere(github, client):
    location = "http://elsewhere.example/"
    github.fail(PYDANTIC, location=location)
    response = client.get(PATH)
    assert response.status_code == 301
    assert response.headers["location"] == response.json()["url"] == location


def test_a_403_with_retry_after_is_the_secondary_limit(github, client):
    github.fail(PYDANTIC, status=403, headers={"Retry-After": 2})
    assert client.get(PATH).json()["message"].startswith("You have exceeded a secondary rate")


def test_impossible_fault(github):
    with pytest.raises(ValueError, match="owner/name"):
        github.fail("pydantic", status=503)


def test_faults_of_other_names_and_routes(github, client):
    github.fail("nobody/nothing", status=503)
    github.fail("/rate_limit", status=502)
    github.fail("tiangolo/fastapi", status=500)
    paths = ("/repos/nobody/nothing", "/rate_limit", "/repos/tiangolo/fastapi")
    assert [client.get(path).status_code for path in paths] == [503, 502, 500]
    assert [client.get(path).status_code for path in paths] == [404, 200, 301]


def test_fault_comes_before_the_rate_limit(github, client):
    github.rate_limit = 0
    github.fail(PYDANTIC, status=503)
    github.fail(PYDANTIC, fields={"stargazers_count": 1})
    github.fail(PYDANTIC, "rate limit")
    assert [client.get(PATH).status_code for _ in range(4)] == [503, 403, 403, 403]
    assert github.requests["remaining"].tolist() == [0] * 4
    assert github.requests["fault"].tolist() == [True, False, True, False]


# The request log


def test_log(github, client):
    github.fail("dask/dask", "reset")
    client.get("/repos/PREFECTHQ/prefect")
    with pytest.raises(DROPPED):
        client.get("/repos/dask/dask?page=1")
    client.get("/rate_limit?page=1")
    client.get("/repos/dask/dask/?page=1")
    log = github.requests
    assert list(log) == ["time", "repository", "status", "duration", "remaining", "fault"]
    assert log["repository"].tolist() == [
        "PREFECTHQ/prefect",
        "dask/dask",
        "/rate_limit",
        "/repos/dask/dask/?page=1",
    ]
    assert log["status"].tolist() == [200, 0, 200, 404]
    assert log["remaining"].tolist() == [4999, 4998, 4998, 4997]
    assert log["fault"].tolist() == [False, True, False, False]
    assert log["time"].iloc[0] == 0.0
    assert log["time"].is_monotonic_increasing
    assert (log["duration"] > 0).all()
    assert github.in_flight_max == 1


# The script


@pytest.fixture
def script():
    """Start the script with arguments; all that still run are ended after the test."""
    processes = []

    def start(*args):
        process = subprocess.Popen(
            [sys.executable, fake_github.__file__, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send these signals")
def test_script(script, http, github):
    taken = script("--port", github.url.rpartition(":")[2])
    processes = {
        signal.SIGTERM: script("--port", "0", "--fail", f"{PYDANTIC}=503x2", "--fail", "a/b=500"),
        signal.SIGINT: script("--port", "0", "--rate-limit", "7", "--rate-window", "9.5"),
    }
    statuses, limits = {}, {}
    for number, process in processes.items():
        url = process.stdout.readline().rstrip("\n")
        assert url.startswith("http://127.0.0.1:")
        assert f"GITHUB_API_URL={url} python pipeline.py" in process.stdout.readline()
        responses = [
            http.get(f"{url}/repos/{name}?page=1") for name in (PYDANTIC, PYDANTIC, PYDANTIC, "a/b")
        ]
        statuses[number] = [r.status_code for r in responses]
        limits[number] = responses[0].headers["x-ratelimit-limit"]
    assert list(statuses.values()) == [[503, 503, 200, 500], [200, 200, 200, 404]]
    assert list(limits.values()) == ["60", "7"]
    out, err = taken.communicate(timeout=60)
    assert (taken.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("Cannot listen on 127.0.0.1:")
    for number, process in processes.items():
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        lines = [f"GET {PATH}?page=1 {status}" for status in statuses[number][:3]]
        lines.append(f"GET /repos/a/b?page=1 {statuses[number][3]}")
        assert out.splitlines()[-4:] == lines


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--latency", "-1"], "latency"),
        (["--latency", "soon"], "latency"),
        (["--rate-limit", "-1"], "rate_limit"),
        (["--rate-window", "0"], "rate_window"),
        (["--port", "65536"], "port"),
        (["--fail", PYDANTIC], "OWNER/NAME=STATUS"),
        (["--fail", f"{PYDANTIC}=600"], "OWNER/NAME=STATUS"),
        (["--fail", f"{PYDANTIC}=503x0"], "OWNER/NAME=STATUS"),
        (["8787"], "unrecognized"),
    ],
)
def test_script_refuses_bad_arguments(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["fake_github.py", *args])
    with pytest.raises(SystemExit) as end:
        fake_github.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
