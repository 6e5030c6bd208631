"""A practice API of any shape, over real HTTP: the description, the log, the faults, the server."""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from queue import Queue

import httpx
import pytest

import practice_api
from practice_api import Api

ROOT = Path(__file__).parents[1]
NAME = "Python_(programming_language)"
PATH = f"/views/{NAME}/2026"
DROPPED = (httpx.ReadError, httpx.RemoteProtocolError)
WORDS = {
    "path": "/views/{name}/2026",
    "answer": lambda name, number: {"article": name, "views": number},
    "line": "{name}: {number} views",
    "variable": "VIEWS_API_URL",
    "limit": "views-api",
}
API = Api(**WORDS)


@pytest.fixture(scope="module")
def server():
    with API.practice(latency=0) as practice:
        yield practice


@pytest.fixture(scope="module")
def http():
    """One client for all: a new one takes a while, as it loads certificates."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def practice(server):
    server.reset()
    return server


@pytest.fixture
def client(practice, http):
    http.base_url = practice.url
    return http


# What an API is like


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"path": "views/{name}"}, ValueError, 'path must begin with "/"'),
        ({"path": "/views"}, ValueError, "path must begin"),
        ({"path": None}, ValueError, "path must begin"),
        ({"path": "/views?{name}=1"}, ValueError, "path must have the name in it"),
        ({"path": "/views#{name}"}, ValueError, "path must have the name in it: http://127.0.0.1"),
        ({"line": "{name} {number"}, ValueError, "line must have {name} and {number} in it"),
        ({"variable": "VIEWS API"}, ValueError, "variable must be the name of an environment"),
        ({"limit": ""}, ValueError, "limit must be the name of a limit"),
        ({"answer": {"views": 1}}, TypeError, "answer must return other JSON"),
        ({"answer": lambda name: name}, TypeError, "answer must return other JSON"),
        ({"answer": lambda name, number: API}, TypeError, "answer must return other JSON"),
        ({"answer": lambda name, number: name}, ValueError, "answer must return other JSON"),
        ({"number": lambda n: str(n)}, TypeError, "number must return another number for each"),
        ({"number": lambda n: n // 10}, ValueError, "number must return another number for each"),
        ({"number": lambda n: n / 0}, TypeError, "number must return another number for each"),
        ({"name": "article"}, TypeError, "name must return another string for each"),
        ({"name": lambda n: n}, TypeError, "name must return another string for each"),
        ({"name": lambda n: "Python"}, ValueError, "name must return another string for each"),
        ({"name": lambda n: "x" * n}, ValueError, "path must have the name in it"),
        ({"headers": "Bearer x"}, ValueError, "headers must be a dictionary"),
        ({"refusal": 200}, ValueError, "refusal must be a status from 400 to 599"),
    ],
)
def test_a_wrong_description_is_told_in_a_sentence(wrong, error, message):
    with pytest.raises(error) as told:
        Api(**WORDS | wrong)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("path", "asked", "name"),
    [
        ("/views/{name}/2026", "/views/AC%2FDC/2026", "AC/DC"),
        ("/views/{name}/2026", "/views/AC/DC/2026", None),
        ("/views/{name}/2026", "/views//2026", None),
        ("/views/{name}/2026", "/views/New%20York/2026?x=1", "New York"),
        ("/views.{name}", "/viewsxPython", None),
        ("/now?city={name}&units=m", "/now?units=m&city=New%20York", "New York"),
        ("/now?city={name}&units=m", "/now?units=f&city=Rome", None),
        ("/now?city={name}&units=m", "/now?units=m", None),
        ("/now?city={name}", "/now?city=Rome&city=Oslo", None),
        ("/now?city={name}&a=1&a=2", "/now?a=1&a=2&city=Rome", "Rome"),
        ("/now?city={name}&a=1&a=2", "/now?a=1&city=Rome", None),
        ("/now?city={name}&exact=", "/now?exact=&city=Rome", "Rome"),
        ("/search?q=in:{name}+AND+open", "/search?q=in%3AR%26D+AND%20open", "R&D"),
        ("/search?q=in:{name}+AND+open", "/search?q=in:R&D+AND+open", None),
        ("/search?q=in:{name}+AND+open", "/search?q=in:Rome", None),
    ],
)
def test_where_a_path_has_its_name(path, asked, name):
    assert Api(**WORDS | {"path": path}).name_in(asked) == name


def test_a_name_may_have_as_many_slashes_as_those_that_are_made_up():
    api = Api(**WORDS | {"path": "/repos/{name}/info", "name": "load-test/{}".format})
    assert api.address("owner/a b") == "/repos/owner/a%20b/info"
    assert api.name_in("/repos/owner/name/info") == "owner/name"
    assert api.name_in("/repos/owner%2Fname/info") == "owner/name"
    assert api.name_in("/repos/name/info") == "name"
    assert api.name_in("/repos/owner/name/issues/info") is None
    assert api.name_in("/repos/owner//info") is None


@pytest.mark.parametrize("path", ["/a/{name}/b", "/now?x=1&city={name}", "/s?q=in:{name}+AND+a"])
@pytest.mark.parametrize("name", ["AC/DC", "a&b=c", "1+1", "100%", "what?#", "a%20b", "{x}", "ë"])
def test_an_address_has_its_name(path, name):
    api = Api(**WORDS | {"path": path})
    assert api.name_in(api.address(name)) == name
    assert api.address(name).isascii()


@pytest.mark.parametrize("path", ["/views/{name}", "/now?city={name}", "/s?q=in:{name}+AND+a"])
def test_a_name_that_is_made_up_is_another_one_without_quote(http, path):
    api = Api(**WORDS | {"path": path})
    name = api.name(17)
    with api.practice(latency=0) as practice:
        http.get(practice.url + path.format(name=name))
        http.get(practice.url + api.address(name))
        wrong, right = practice.requests["name"]
    assert wrong != name == right


# APIs that people have


def test_download_counts_of_npm(http):
    api = Api(
        path="/downloads/point/last-month/{name}",
        answer=lambda name, number: {"downloads": number, "package": name},
        line="{name}: {number} downloads",
        variable="NPM_API_URL",
        limit="npm-api",
        name="@scope/package-{}".format,
    )
    with api.practice(latency=0) as npm:
        path = f"{npm.url}/downloads/point/last-month"
        for spelt in "@babel/core", "@babel%2Fcore", "%40babel%2Fcore":
            response = http.get(f"{path}/{spelt}")
            count = npm.number("@babel/core")
            assert response.json() == {"downloads": count, "package": "@babel/core"}
        assert http.get(f"{path}/react").json()["package"] == "react"
        assert http.get(f"{path}/@babel/core/x").status_code == 404


def test_the_weather_of_a_city_with_a_key_in_the_address(http):
    api = Api(
        path="/data/2.5/weather?q={name}&units=metric&appid=practice-key",
        answer=lambda name, number: {"name": name, "main": {"temp": number}},
        number=lambda n: n / 10 - 40,
        line="{name}: {number} degrees",
        variable="WEATHER_API_URL",
        limit="weather-api",
    )
    with api.practice(latency=0) as weather:
        weather.numbers = {"São Paulo": 523, "Nuuk": 283}
        for city, degrees in ("São Paulo", 12.3), ("Nuuk", -11.7):
            asked = {"appid": "practice-key", "q": city, "units": "metric"}
            body = http.get(f"{weather.url}/data/2.5/weather", params=asked).json()
            assert body == {"name": city, "main": {"temp": pytest.approx(degrees)}}
            assert body["main"]["temp"] == weather.number(city)
            assert http.get(weather.url + api.address(city)).json() == body
        weather.fail("São Paulo", body=api.answer("São Paulo", None))
        assert http.get(weather.url + api.address("São Paulo")).json()["main"] == {"temp": None}
        asked["appid"] = "other"
        assert http.get(f"{weather.url}/data/2.5/weather", params=asked).status_code == 404


def test_an_issue_tracker_with_a_token(http):
    api = Api(
        path="/rest/api/2/search?jql=project={name}+AND+status=open&maxResults=0",
        answer=lambda name, number: {"total": number, "issues": []},
        line="{name}: {number} open issues",
        variable="TRACKER_API_URL",
        limit="tracker-api",
        headers={"Authorization": "Bearer practice-key"},
    )
    with api.practice(latency=0, rate_limit=2) as tracker:

        def search(project, **headers):
            jql = f"project={project} AND status=open"
            asked = {"jql": jql, "maxResults": 0}
            return http.get(f"{tracker.url}/rest/api/2/search", params=asked, headers=headers)

        key = {"authorization": "Bearer practice-key"}
        for headers in {}, {"authorization": "Bearer other"}:
            response = search("R&D", **headers)
            assert response.status_code == 401
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["title"] == "Unauthorized"
        assert search("R&D", **key).json() == {"total": tracker.number("R&D"), "issues": []}
        assert http.get(f"{tracker.url}/x?jql=project=R", headers=key).status_code == 404
        assert search("R&D", **key).status_code == 429
        assert search("R&D").status_code == 401
        log = tracker.requests
    assert log["name"].tolist() == [*["R&D"] * 3, "/x?jql=project=R", *["R&D"] * 2]
    assert log["status"].tolist() == [401, 401, 200, 404, 429, 401]
    assert log["remaining"].tolist() == [2, 2, 1, 0, 0, 0]


def test_answers_are_made_up_and_always_the_same(practice, client):
    answer = client.get(PATH)
    assert answer.json() == {"article": NAME, "views": practice_api.made_up(NAME)}
    assert client.get(PATH).content == answer.content
    practice.numbers = {NAME: 7}
    assert client.get(PATH).json()["views"] == 7
    practice.numbers = {}
    other = client.get("/views/Rust/2026").json()
    assert other["views"] != answer.json()["views"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/views/Rust"), ("GET", "/"), ("POST", "/views/Rust/2026")]
)
def test_what_is_not_there(client, method, path):
    response = client.request(method, path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json() == {"type": "about:blank", "title": "Not Found", "status": 404}


def test_some_apis_want_to_know_who_asks(http):
    with Api(**WORDS, user_agent=True).practice(latency=0) as practice:
        for agent, status in (("python-httpx/0.28", 403), ("", 403), ("stars (me@example)", 200)):
            answer = http.get(practice.url + PATH, headers={"user-agent": agent})
            assert answer.status_code == status


def test_rate_limit(practice, client):
    practice.rate_limit, practice.rate_window = 2, 60
    responses = [client.get(PATH) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert 0 < int(responses[2].headers["retry-after"]) <= 61
    assert practice.requests["remaining"].tolist() == [1, 0, 0]
    assert not practice.requests["fault"].any()
    practice.rate_limit = 3
    assert client.get(PATH).status_code == 200


# Faults


def test_status(practice, client):
    practice.fail(NAME, status=404)
    practice.fail(NAME, status=429, headers={"retry-after": 2})
    missing, refused = client.get(PATH), client.get(PATH)
    assert (missing.status_code, missing.json()["title"]) == (404, "Not Found")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert client.get(PATH).status_code == 200


def test_a_fault_for_whoever_comes(practice, client):
    practice.fail("*", status=503, times=2)
    practice.fail(NAME, status=500)
    asked = [PATH, "/views/Rust/2026", "/", PATH]
    assert [client.get(path).status_code for path in asked] == [500, 503, 503, 200]


def test_connection_reset(practice, client):
    assert client.get(PATH).status_code == 200  # so that the connection is an open one
    practice.fail(NAME, "reset", times=2)
    for _ in range(2):
        with pytest.raises(DROPPED):
            client.get(PATH)
    assert client.get(PATH).status_code == 200
    assert practice.requests["status"].tolist() == [200, 0, 0, 200]


def test_truncated_body(practice, client):
    practice.fail(NAME, "truncated")
    with client.stream("GET", PATH) as response:
        assert response.status_code == 200
        with pytest.raises(DROPPED):
            response.read()
    assert 0 < response.num_bytes_downloaded < int(response.headers["content-length"])
    assert client.get(PATH).status_code == 200
    assert practice.requests["status"].tolist() == [0, 200]


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ("", b""),
        ("<p>Sign in</p>", b"<p>Sign in</p>"),
        ('{"stargazers_count": 265', b'{"stargazers_count": 265'),
        (b"\xff\xfe", b"\xff\xfe"),
        ({"article": "Rust"}, b'{"article":"Rust"}'),
        ([], b"[]"),
    ],
)
def test_other_body(practice, client, body, sent):
    practice.fail(NAME, body=body)
    response = client.get(PATH)
    assert (response.status_code, response.content) == (200, sent)
    assert response.headers["content-length"] == str(len(sent))
    assert response.headers["content-type"].startswith("application/json")
    practice.fail(NAME, body=body, status=500)
    response = client.get(PATH)
    assert (response.status_code, response.content) == (500, sent)


def test_other_fields(practice, client):
    usual = client.get(PATH).json()
    practice.fail(NAME, fields={"views": None})
    practice.fail(NAME, fields={"views": ...})
    assert client.get(PATH).json() == usual | {"views": None}
    assert client.get(PATH).json() == {"article": NAME}
    with Api(**WORDS | {"answer": lambda name, n: [{"views": n}]}).practice(latency=0) as other:
        other.fail(NAME, fields={"views": 0})
        assert client.get(other.url + PATH).json() == [{"views": 0}]


def test_more_latency(practice, client):
    practice.fail(NAME, latency=0.3)
    order = []

    def fetch(name):
        client.get(f"/views/{name}/2026")
        order.append(name)

    slow = threading.Thread(target=fetch, args=(NAME,))
    slow.start()
    while practice.requests.empty:
        time.sleep(0.005)
    fetch("Rust")
    slow.join()
    assert order == ["Rust", NAME]
    assert practice.requests["name"].tolist() == [NAME, "Rust"]
    assert practice.requests["status"].tolist() == [200, 200]
    assert practice.requests["duration"].idxmax() == 0


def test_faults_come_first_in_first_out(practice, client):
    practice.fail(NAME.upper(), status=503, times=2)
    practice.fail(NAME, status=502)
    practice.fail("Rust", status=500)
    assert [client.get(PATH).status_code for _ in range(4)] == [503, 503, 502, 200]
    assert client.get("/views/Rust/2026").status_code == 500


@pytest.mark.parametrize("end", ["mend", "reset"])
def test_fault_lasts_until_it_is_ended(practice, client, end):
    practice.fail(NAME, status=503, times=None)
    assert [client.get(PATH).status_code for _ in range(5)] == [503] * 5
    getattr(practice, end)()
    assert client.get(PATH).status_code == 200
    statuses = {"mend": [503] * 5 + [200], "reset": [200]}
    assert practice.requests["status"].tolist() == statuses[end]


def test_faults_combine(practice, client):
    practice.fail(NAME, status=503, latency=0.05, html=True, headers={"retry-after": "1"})
    response = client.get(PATH)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<h1>503</h1>" in response.text


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([NAME], {}, "what should go wrong"),
        ([NAME], {"times": 2}, "what should go wrong"),
        ([NAME, "drop"], {}, "kind"),
        ([NAME], {"status": 99}, "status"),
        ([NAME], {"status": 600}, "status"),
        ([NAME], {"status": 503, "times": 0}, "times"),
        ([NAME], {"latency": -1}, "latency"),
    ],
)
def test_impossible_faults(practice, client, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        practice.fail(*args, **kwargs)
    assert client.get(PATH).status_code == 200


# The request log


def test_empty_log_has_the_same_columns(practice, client):
    empty = practice.requests
    client.get(PATH)
    assert len(empty) == 0
    assert empty.dtypes.to_dict() == practice.requests.dtypes.to_dict()
    numbers = ["time", "status", "duration", "remaining", "fault"]
    assert [dtype.kind for dtype in empty.dtypes[numbers]] == list("fifib")
    assert practice.in_flight_max == 1


def test_requests_overlap(practice):
    practice.latency = 0.3

    async def fetch_all():
        async with httpx.AsyncClient(base_url=practice.url, trust_env=False) as client:
            return await asyncio.gather(*(client.get(PATH) for _ in range(10)))

    assert practice.in_flight_max == 0
    responses = asyncio.run(fetch_all())
    assert [r.status_code for r in responses] == [200] * 10
    assert practice.in_flight_max == 10
    log = practice.requests
    assert (log["duration"] > log["time"]).all()  # the last one came before the first was answered


def test_reset_restores_everything(client, practice):
    practice.latency, practice.rate_limit, practice.rate_window = 0.01, 1, 1.5
    practice.fail(NAME, status=500)
    client.get(PATH)
    client.get(PATH)
    practice.reset()
    assert (practice.latency, practice.rate_limit, practice.rate_window) == (0, 5000, 3600.0)
    assert practice.requests.empty
    assert practice.in_flight_max == 0
    client.get(PATH)
    assert practice.requests["remaining"].tolist() == [4999]


def test_threads_do_not_disturb_each_other(practice, client):
    def fetch():
        for _ in range(50):
            statuses.append(client.get(PATH).status_code)

    statuses = []
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        practice.fail(NAME, status=503)
        practice.requests  # noqa: B018
    for thread in threads:
        thread.join()
    while practice.requests.shape[0] < 250:  # what is left of the faults
        statuses.append(client.get(PATH).status_code)
    assert statuses.count(503) == 50
    assert practice.requests["status"].value_counts().to_dict() == {200: 200, 503: 50}
    assert sorted(practice.requests["remaining"], reverse=True) == list(range(4999, 4749, -1))


# Connections


def port_of(practice):
    return int(practice.url.rpartition(":")[2])


def test_300_connections_stay_open(practice):
    with contextlib.suppress(ImportError):  # Windows has no such limit, macOS a low one
        import resource

        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files < 1024:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most))
    practice.latency = 0.1
    with contextlib.ExitStack() as stack:
        port = port_of(practice)
        connections = [HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(300)]
        for n in range(2):
            sockets = []
            for connection in connections:
                connection.request(
                    "GET", f"/views/article-{n}/2026", headers={"user-agent": "test"}
                )
                sockets.append(connection.sock)
                stack.callback(connection.close)
            for connection in connections:
                assert connection.getresponse().read().startswith(b'{"article":')
            assert [connection.sock for connection in connections] == sockets
    assert practice.requests["status"].tolist() == [200] * 600


def test_client_that_hangs_up_is_no_trouble(practice, client, monkeypatch, capfd, caplog):
    ended = Queue()
    practice.latency = 60
    address = ("127.0.0.1", port_of(practice))
    with socket.create_connection(address) as connection:
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUser-Agent: test\r\n\r\n".encode())
        while practice.requests.empty:
            time.sleep(0.005)
        # Not earlier: a request of the test before this one is told of after its answer.
        monkeypatch.setattr(practice, "on_request", ended.put)
    assert ended.get(timeout=20) == f"GET {PATH} 0"
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /views")  # and no more
    practice.latency = 0
    assert client.get(PATH).status_code == 200
    assert practice.requests["status"].tolist() == [0, 200]
    assert capfd.readouterr().err == ""
    assert caplog.records == []


# Starting and stopping


def test_start_and_stop(http):
    threads = set(threading.enumerate())
    practice = API.practice(latency=0)
    with pytest.raises(RuntimeError, match="start"):
        _ = practice.url
    assert practice.start() is practice
    url = practice.url
    assert url.startswith("http://127.0.0.1:")
    assert practice.start().url == url
    (thread,) = set(threading.enumerate()) - threads
    assert thread.daemon
    assert http.get(f"{url}{PATH}").status_code == 200
    practice.stop()
    practice.stop()
    assert not thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        http.get(f"{url}{PATH}")
    with practice:
        assert http.get(f"{practice.url}{PATH}").status_code == 200
    assert len(practice.requests) == 2


def test_two_servers_know_nothing_of_each_other(practice, client):
    with API.practice(latency=0) as other:
        assert other.url != practice.url
        other.fail(NAME, status=503)
        assert client.get(PATH).status_code == 200
        assert other.requests.empty


def test_taken_port():
    with API.practice() as practice:
        port = port_of(practice)
    rivals, together, refusals = (
        [API.practice(port=port) for _ in range(8)],
        threading.Barrier(8),
        [],
    )

    def start(rival):
        together.wait(timeout=30)
        try:
            rival.start()
        except OSError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=start, args=(rival,)) for rival in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rival in rivals:
        rival.stop()
    assert len(refusals) in (7, 8)  # at the very same moment the system may refuse both
    for refusal in refusals:
        assert re.fullmatch(rf"Cannot listen on 127\.0\.0\.1:{port} \(.+\): .+\.", refusal)


def test_stop_drops_what_is_under_way(http):
    failures = []

    def fetch():
        try:
            http.get(f"{url}{PATH}")
        except httpx.TransportError as error:
            failures.append(error)

    with API.practice(latency=60) as practice:
        url = practice.url
        thread = threading.Thread(target=fetch)
        thread.start()
        while practice.requests.empty:
            time.sleep(0.005)
    thread.join()
    assert isinstance(failures[0], DROPPED)
    assert practice.requests["status"].tolist() == [0]


def test_kernel_is_left_alone(http, caplog):
    loggers = [logging.getLogger(name) for name in (None, "asyncio", "uvicorn")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with API.practice(latency=0) as practice, caplog.at_level(logging.DEBUG, "asyncio"):
        http.get(f"{practice.url}{PATH}")
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert [r for r in caplog.records if r.name.startswith("uvicorn")] == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"latency": -1},
        {"latency": float("nan")},
        {"latency": float("inf")},
        {"rate_limit": -1},
        {"rate_window": 0},
        {"port": 65536},
        {"port": -1},
    ],
)
def test_impossible_settings(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        API.practice(**arguments)


@pytest.mark.parametrize("status", [None, 302, 307])
def test_redirect_to_anywhere(practice, client, status):
    location = "http://elsewhere.example/"
    practice.fail(NAME, status=status, location=location)
    response = client.get(PATH)
    assert response.status_code == (status or 301)
    assert response.headers["location"] == location


# The script


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a description in it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_apis.py").write_text(
        """from practice_api import Api

number = 3
VIEWS = Api(
    path="/views/{name}/2026",
    answer=lambda name, number: {"article": name, "views": number},
    line="{name}: {number} views",
    variable="VIEWS_API_URL",
    limit="views-api",
)
"""
    )
    yield tmp_path
    sys.modules.pop("my_apis", None)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send this signal")
def test_script(files, http):
    script = [sys.executable, practice_api.__file__, f"{files}/my_apis.py:VIEWS", "--port", "0"]
    process = subprocess.Popen(
        [*script, "--fail", "New York=503x2"], stdout=-1, stderr=-1, text=True
    )
    url = process.stdout.readline().rstrip("\n")
    assert f"VIEWS_API_URL={url} python YOUR_FLOW.py" in process.stdout.readline()
    path = "/views/New%20York/2026?a=1"
    assert [http.get(url + path).status_code for _ in range(3)] == [503, 503, 200]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-3:] == [f"GET {path} {status}" for status in (503, 503, 200)]


@pytest.mark.parametrize(
    ("runs", "hint"),
    [
        ("import sys\nsys.exit(3)", True),
        ("from prefect import flow\n@flow\ndef mine(names): return 1 / 0\nmine([])", True),
        ("1 / 0", False),
    ],
)
def test_a_file_that_runs_its_flow_when_it_is_imported(github, files, runs, hint):
    (files / "my_apis.py").write_text(runs)
    with pytest.raises(ValueError, match=r"cannot import .+my_apis.py \((SystemExit|Zero)") as told:
        practice_api.load(f"{files}/my_apis.py:VIEWS")
    assert ("__main__" in str(told.value)) == hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_apis.py"], "does not read FILE.py:NAME"),
        (["nowhere.py:VIEWS"], "there is no file"),
        (["my_apis.py:views"], "there is no views in"),
        (["my_apis.py:number"], "is no Api"),
        (["my_apis.py:VIEWS", "--rate-window", "0"], "rate_window"),
        (["my_apis.py:VIEWS", "--fail", "Rust=600"], "NAME=STATUS"),
    ],
)
def test_script_refuses_bad_arguments(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", ["practice_api.py", *arguments])
    with pytest.raises(SystemExit) as end:
        practice_api.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
