"""A practice API on 127.0.0.1: real HTTP, no network, faults on demand.

An `Api` describes an API that has a number for each name, such as the page views of an article:

    PAGEVIEWS = Api(
        path="/metrics/pageviews/per-article/en.wikipedia/all-access/all-agents/{name}"
        "/monthly/2026010100/2026013100",
        answer=lambda name, number: {"items": [{"article": name, "views": number}]},
        line="{name}: {number} views",
        variable="WIKIMEDIA_API_URL",
        limit="wikimedia-api",
    )

Its practice API has a response for any name, with a number that is made up and always the same:

    views = PAGEVIEWS.practice().start()                  in a notebook
    httpx.get(views.url + PAGEVIEWS.address("AC/DC"))     a request for a name
    views.fail("AC/DC", status=503)                       the next one for it fails
    views.requests                                        the request log

    python notebooks/practice_api.py my_apis.py:PAGEVIEWS --port 8788     in a terminal

fake_github.py has GitHub's, with all that the lessons need of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib
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
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.client import responses
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:  # it takes longer to import than all the rest, so only for a table
    import pandas as pd

HOST = "127.0.0.1"


# --- What an API is like --------------------------------------------------------------------------


ODD = "Zoë & Co/{}".format  # a flow that sends it without `quote` asks for something else


@dataclass(frozen=True, kw_only=True)
class Api:
    """An API that has a number for each name: one GET request, one number.

    path: path and query of a request for a name, as "/weather?q={name}&units=metric"
    answer: a function of a name and a number; returns the body of the response, for JSON
    line: what a flow prints for a name, as "{name}: {number} degrees"
    variable: the environment variable that has the API's address
    limit: the global concurrency limit of this API
    number: a function of a whole number; returns a number that this API could have, as 12.3 or -3
    name: a function of a whole number; returns a name that this API could have. If it has slashes,
        a request may have as many that are not quoted, as in GitHub's "owner/name".
    headers: those that each request must have, as {"Authorization": "Bearer practice-key"}; the
        status is 401 without them
    refusal: the status of its response to too many requests
    user_agent: whether it refuses clients that do not say who they are, as "python-httpx/0.28"
    server: its own practice API, if it has one: a subclass of `PracticeAPI`

    Each is tried. Raises `TypeError` or `ValueError`, in one sentence, for what does not fit.
    """

    path: str
    answer: Callable[[str, Any], Any]
    line: str
    variable: str
    limit: str
    number: Callable[[int], float] = lambda number: number
    name: Callable[[int], str] = ODD
    headers: Mapping[str, str] = field(default_factory=dict)
    refusal: int = 429
    user_agent: bool = False
    server: Callable[..., PracticeAPI] | None = None

    def __post_init__(self) -> None:
        texts = self.path, self.line, self.variable, self.limit
        path, line, variable, limit = (text if isinstance(text, str) else "" for text in texts)
        for right, word, words in (
            (path[:1] == "/" and path.count("{name}") == 1, "path",
             'begin with "/" and have {name} in it once'),
            (line.count("{name}") == line.count("{number}") == 1, "line",
             "have {name} and {number} in it, each once"),
            (re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII), "variable",
             "be the name of an environment variable"),
            (limit, "limit", "be the name of a limit"),
            (isinstance(self.headers, dict), "headers", "be a dictionary"),
            (self.refusal in range(400, 600), "refusal", "be a status from 400 to 599"),
        ):  # fmt: skip
            _check(bool(right), f"{word} must {words}, not {getattr(self, word)!r}")
        for word, words, made in (
            ("name", "another string", lambda n: self.name(n) + ""),
            ("number", "another number", lambda n: self.number(n) + 0),
            ("answer", "other JSON",
             lambda n: json.dumps(self.answer(self.name(0), self.number(n)))),
        ):  # fmt: skip
            must = f"{word} must return {words} for each whole number"
            try:
                count = len({made(n) for n in range(100)})
            except Exception as error:
                raise TypeError(f"{must} ({type(error).__name__}: {error})") from None
            _check(count == 100, f"{must}, but returns {count} for 100 of them")
        for name in map(self.name, range(3)):
            url = urlsplit(address := f"http://{HOST}{self.address(name)}")
            found = self.name_in(f"{url.path}?{url.query}")
            _check(found == name, f"path must have the name in it: {address} has {found!r}")

    @property
    def _slashes(self) -> int:
        """How many slashes of a name need not be quoted."""
        return 0 if self.name is ODD else self.name(0).count("/")

    def address(self, name: str) -> str:
        """The path and query of a request for a name; `name_in` is the inverse."""
        return self.path.replace("{name}", quote(name, safe="/" if self._slashes else ""))

    def name_in(self, address: str) -> str | None:
        """The name in the path and query of a request; None if they are not this API's.

        The parameters may come in any order, and others with them.
        """
        keys = parse_qs(self.path.partition("?")[2], keep_blank_values=True)
        part = "[^\0\1]+"
        name = f"({part}(?:\0{part}){{0,{self._slashes}}})"
        pattern = re.escape(_plain(self.path, keys)).replace(re.escape("{name}"), name)
        match = re.fullmatch(pattern, _plain(address, keys))
        return match[1].replace("\0", "/") if match else None

    def practice(self, **options) -> PracticeAPI:
        """Its practice API, not yet started; the options are those of `PracticeAPI`."""
        return self.server(**options) if self.server else PracticeAPI(self, **options)


def _plain(address: str, keys: Iterable[str]) -> str:
    """A path and the parameters with these keys, unquoted. NUL is a slash that was not quoted."""
    path, _, query = address.partition("?")
    given = parse_qs(query, keep_blank_values=True)
    parameters = [text for key in keys for text in (key, *given.get(key, ()))]
    return "\1".join(["\0".join(map(unquote, path.split("/"))), *parameters])


def made_up(name: str) -> int:
    """A whole number below 100,000, always the same for the same name."""
    return number_of(name) % 100_000


def number_of(text: str) -> int:
    """A whole number below 2**48, always the same for the same text."""
    return int(hashlib.sha256(text.lower().encode()).hexdigest()[:12], 16)


# --- The practice API -----------------------------------------------------------------------------


class PracticeAPI:
    """An API on 127.0.0.1, served by a daemon thread; also a context manager.

    api: what it is like
    latency: seconds each response takes; responses overlap.
    rate_limit: requests per window; a 401 is free.
    rate_window: seconds; a window begins with the first request charged to it.
    port: 0 takes any free port.

    `latency`, `rate_limit` and `rate_window` can be set at any time. Raises ValueError for
    arguments that make no sense. `on_request`, if set, is called in the server's thread with a
    line for each request, such as "GET /repos/dask/dask 200". While `hold`, if set, returns True,
    a response sends nothing but spaces, so that no client gives up. `numbers` has the whole numbers
    of names; those of other names are made up. `number` has what the API makes of them.
    """

    kinds = ("reset", "truncated")
    column = "name"  # of the log

    def __init__(
        self,
        api: Api,
        latency: float = 0.1,
        rate_limit: int = 5000,
        rate_window: float = 3600,
        port: int = 0,
    ) -> None:
        _check(0 <= latency < math.inf, f"latency must be 0 seconds or more, not {latency}")
        _check(rate_limit >= 0, f"rate_limit must be 0 requests or more, not {rate_limit}")
        _check(0 < rate_window < math.inf, f"rate_window must be over 0 s, not {rate_window}")
        _check(0 <= port <= 65535, f"port must be from 0 to 65535, not {port}")
        self.api = api
        self.latency, self.rate_limit, self.rate_window = latency, rate_limit, rate_window
        self.on_request: Callable[[str], None] | None = None
        self.hold: Callable[[], bool] | None = None
        self.numbers: dict[str, int] = {}
        self._settings = latency, rate_limit, rate_window
        self._port = port
        self._url = ""
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # guards the three below
        self._log: list[_Row] = []
        self._faults: dict[str, deque[Fault]] = {}
        self._windows: dict[str, tuple[float, int]] = {}  # by account: began (epoch s), used

    def start(self) -> Self:
        """Serve; return once it responds. Does nothing if serving already.

        Raises OSError if the port cannot be had.
        """
        if self._thread is not None:
            return self
        listener = _listen(self._port)
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
    def requests(self) -> pd.DataFrame:
        """One row per request since the last reset, in order of arrival.

        time: seconds since the first request arrived.
        name: as requested, or path and query of a request that has none. `fail` takes these.
        status: 0 if the connection was dropped on purpose, if the client hung up before the
            response, or while the request is in flight.
        duration: seconds from arrival to the end of the response (to now if in flight).
        remaining: what the rate limit has left after this request, whatever the response says.
        fault: whether a fault made or changed the response. It is False for each refusal by the
            rate limit itself, and True for a refusal by `fail`.
        """
        import pandas as pd

        with self._lock:
            rows = list(self._log)
        now = time.perf_counter()
        first = rows[0].arrived if rows else now
        columns = {
            "time": pd.Series([r.arrived - first for r in rows], dtype="float64"),
            self.column: pd.Series([r.name for r in rows], dtype="str"),
            "status": pd.Series([r.status for r in rows], dtype="int64"),
            "duration": pd.Series([(r.ended or now) - r.arrived for r in rows], dtype="float64"),
            "remaining": pd.Series([r.remaining for r in rows], dtype="int64"),
            "fault": pd.Series([r.fault for r in rows], dtype="bool"),
        }
        return pd.DataFrame(columns)

    @property
    def in_flight_max(self) -> int:
        """Largest number of requests in flight since the last reset."""
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

    def number(self, name: str) -> float:
        """The number of a name."""
        return self.api.number(self.numbers.get(name, made_up(name)))

    def fail(self, name: str, kind: str | None = None, **fault) -> None:
        """Make the next `times` requests for a name fail; None means until reset().

        name: in any case, or path and query as the log shows them; "*" is the next request of all
            that have no fault of their own

        A name's faults are used up in the order given, so what follows one with times=None never
        comes. They can be combined, as in `fail(name, status=503, latency=2)`. Raises ValueError
        for a fault that cannot be.

        Instead of the usual response, whatever that would have been:
            status=503               the API's body for this status (200 to 599)
            status=503, html=True    an HTML page; without a status, 200
            location="https://…"     a redirect: 301, or 302, 307 … if that is the status
            body='{"id": 1'          200 or status with this body: str and bytes are sent as they
                                     are (nothing, no JSON, half of it), all else as JSON
        The usual response, changed:
            fields={"stars": None}   other values in an object, or in each of a list; `...` drops
                                     a field
            headers={"retry-after": 2}          more headers; None drops one
            latency=5                           seconds on top of the usual
        No response:
            "reset"                  the connection is reset before the response
            "truncated"              the connection is closed halfway through the body
        """
        new = Fault(kind, **fault)
        known = kind is None or kind in self.kinds
        _check(known, f"kind must be one of {self.kinds}, not {kind!r}")
        times, status, latency = new.times, new.status, new.latency
        _check(times is None or times >= 1, f"times must be 1 or more, or None, not {times}")
        _check(status is None or 200 <= status <= 599, f"status must be 200 to 599, not {status}")
        _check(0 <= latency < math.inf, f"latency must be 0 seconds or more, not {latency}")
        _check(new != Fault(times=times), "say what should go wrong, such as status=503")
        with self._lock:
            self._faults.setdefault(name.lower(), deque()).append(new)

    # What the API responds: a subclass can have others of these.

    def name_of(self, request: Request) -> str:
        """What the log and `fail` call a request: the name in it, or its path and query."""
        return self.api.name_in(address_of(request)) or address_of(request)

    def answer(self, request: Request, name: str, fault: Fault) -> Answer:
        """The response to a request within the rate limit."""
        if any(request.headers.get(key) != str(value) for key, value in self.api.headers.items()):
            return self.error(401)
        agent = request.headers.get("user-agent", "")
        if self.api.user_agent and re.match(r"$|python-|curl/|Python-urllib", agent):
            return self.error(403)
        if request.method not in ("GET", "HEAD") or name == address_of(request):
            return self.error(404)
        return Answer(200, changed(self.api.answer(name, self.number(name)), fault.fields))

    def error(self, status: int, headers: Mapping[str, object] | None = None) -> Answer:
        """The body for a status, as RFC 9457 has it."""
        title = responses.get(status, "Error")
        body = {"type": "about:blank", "title": title, "status": status}
        return Answer(status, body, {"content-type": "application/problem+json"})

    def redirect(self, status: int, location: str) -> Answer:
        return Answer(status, self.error(status).body, {"location": location})

    def refused(self, request: Request, rate: dict[str, int]) -> Answer:
        """The response to a request too many."""
        answer = self.error(self.api.refusal)
        answer.headers["retry-after"] = str(max(1, rate["reset"] - int(time.time())))
        return answer

    def instead_of(self, usual: Answer, fault: Fault, request: Request) -> Answer:
        """The response that takes the usual one's place, or the usual one itself."""
        if fault.html:
            page = f"<!DOCTYPE html>\n<title>Sorry</title>\n<h1>{fault.status or 200}</h1>\n"
            return Answer(fault.status or 200, page, {"content-type": "text/html; charset=utf-8"})
        if fault.body is not None:
            return Answer(fault.status or 200, fault.body)
        if fault.location is not None:
            return self.redirect(fault.status or 301, fault.location)
        return usual if fault.status in (None, 200) else self.error(fault.status, fault.headers)

    def account(self, request: Request, answer: Answer) -> tuple[str, int, int]:
        """Who pays for a request, how many that account may send in a window, and what it costs."""
        return "", self.rate_limit, int(answer.status != 401)

    def headers(self, rate: dict[str, int]) -> dict[str, str]:
        """The headers of every response."""
        return {}

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
                if self.hold is None:
                    await response(scope, receive, send)
                else:
                    await self._send_later(response, send)
        except asyncio.CancelledError:  # stop() does not wait for long
            request.state.transport.abort()
            raise
        finally:
            row.ended = time.perf_counter()
            if self.on_request is not None:
                self.on_request(f"{request.method} {address_of(request)} {row.status}")

    async def _send_later(self, response: Response, send: Send) -> None:
        """Send spaces, which JSON may begin with, and the body when it is not held any longer."""
        del response.headers["content-length"]
        start = {"status": response.status_code, "headers": response.raw_headers}
        await send({"type": "http.response.start", **start})
        while self.hold is not None and self.hold():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": response.body})

    def _arrive(self, request: Request) -> tuple[_Row, Fault, Response]:
        """Log a request, charge it and prepare its response; the caller holds the lock."""
        name = self.name_of(request)
        fault = self._next_fault(name)
        usual = self.answer(request, name, fault)
        answer = self.instead_of(usual, fault, request)
        within_limit, rate = self._charge(*self.account(request, answer))
        if refused := answer is usual and not within_limit:
            answer = self.refused(request, rate)
        row = _Row(name, rate["remaining"], fault=fault != Fault() and not refused)
        self._log.append(row)
        if fault.kind == "rate limit":
            rate |= {"remaining": 0, "used": rate["limit"]}
        return row, fault, answer.response(self.headers(rate), fault.headers)

    def _next_fault(self, name: str) -> Fault:
        """Take a fault from the name's queue; one without effect if there is none."""
        queue = self._faults.get(name.lower()) or self._faults.get("*")
        if not queue:
            return Fault()
        fault = queue[0]
        if fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                queue.popleft()
        return fault

    def _charge(self, account: str, limit: int, cost: int) -> tuple[bool, dict[str, int]]:
        """Charge an account's window: whether that is within the limit, and how it stands."""
        now = time.time()
        began, used = self._windows.get(account, (now, 0))
        if now >= began + self.rate_window:
            began, used = now, 0
        within_limit = used + cost <= limit or cost == 0
        if cost and within_limit:
            used += cost
            self._windows[account] = began, used
        remaining, reset = max(0, limit - used), math.ceil(began + self.rate_window)
        rate = {"limit": limit, "remaining": remaining, "used": used, "reset": reset}
        return within_limit, rate


@dataclass
class _Row:
    """A line of the request log; times in seconds of `time.perf_counter`."""

    name: str
    remaining: int
    fault: bool
    arrived: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    status: int = 0


@dataclass
class Answer:
    """A response before it becomes HTTP; a body other than str and bytes is sent as JSON."""

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

    def response(self, usual: Mapping[str, str], fault: Mapping[str, object]) -> Response:
        """With the headers that all responses have, and those of a fault."""
        headers: dict[str, object] = dict(usual)
        if self.status not in (204, 304):
            headers["content-type"] = "application/json; charset=utf-8"
        headers |= self.headers | {name.lower(): value for name, value in fault.items()}
        kept = {name: str(value) for name, value in headers.items() if value is not None}
        return Response(self.encode(), self.status, kept)


@dataclass
class Fault:
    """The arguments of `PracticeAPI.fail`; without any, it has no effect."""

    kind: str | None = None
    times: int | None = 1
    status: int | None = None
    headers: dict[str, object] = field(default_factory=dict)
    latency: float = 0.0
    location: str | None = None
    html: bool = False
    body: object = None
    fields: dict[str, object] = field(default_factory=dict)


def changed(body: Any, fields: Mapping[str, object]) -> Any:
    """An object with other fields, or a list of objects; `...` drops a field."""
    if isinstance(body, list):
        return [changed(item, fields) for item in body]
    if not isinstance(body, dict):
        return body
    return {key: value for key, value in (body | dict(fields)).items() if value is not ...}


def path_of(request: Request) -> str:
    """The path as sent: %2F is no slash."""
    return bytes(request.scope["raw_path"]).decode()


def address_of(request: Request) -> str:
    """The path and query as sent."""
    return path_of(request) + f"?{request.url.query}".removesuffix("?")


def _check(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


# --- Connections ----------------------------------------------------------------------------------


def _listen(port: int) -> socket.socket:
    # With TCP by name, or asyncio does not turn Nagle's algorithm off.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":  # on Windows this option would let two servers share the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # two may bind the same port at the same moment, but not listen
    except OSError as error:
        listener.close()
        raise OSError(
            f"Cannot listen on {HOST}:{port} ({error.strerror}): "
            "choose another port, or 0 for any free one."
        ) from None
    return listener


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
    """Reset the connection before the response, or close it halfway through the body."""
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


# --- The script -----------------------------------------------------------------------------------


def load(target: str) -> Any:
    """What FILE.py:NAME stands for. Raises ValueError, in one sentence, if that cannot be found."""
    file, _, name = target.rpartition(":")
    path = Path(file).resolve()
    _check(file.endswith(".py") and bool(name), f"{target!r} does not read FILE.py:NAME")
    _check(path.is_file(), f"there is no file {file}")
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ran = any(frame.filename.endswith("flow_engine.py") for frame in frames)
        cure = '; put what it runs under `if __name__ == "__main__":`'
        cure *= ran or isinstance(error, SystemExit)
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot import {file} ({why}){cure}") from None
    found = getattr(module, "__file__", None)
    _check(found == str(path), f"{path.stem} is another module ({found}): give {file} another name")
    _check(hasattr(module, name), f"there is no {name} in {file}")
    return getattr(module, name)


def load_api(target: str) -> Api:
    """The `Api` that FILE.py:NAME stands for. Raises ValueError."""
    api = load(target)
    _check(isinstance(api, Api), f"{target} is no Api, but {type(api).__name__!r}")
    return api


def parser_for(description: str, name: str, rate_limit: int) -> argparse.ArgumentParser:
    """The options of a practice API; `name` stands for a name in their help."""
    parser = argparse.ArgumentParser(description=description)
    for option, kind, default, text in (
        ("--port", int, 8787, "0 takes any free one"),
        ("--latency", float, 0.0, "seconds each response takes"),
        ("--rate-limit", int, rate_limit, "requests per window"),
        ("--rate-window", float, 3600.0, "seconds"),
    ):
        parser.add_argument(option, type=kind, default=default, help=f"{text} (%(default)s)")
    metavar = f"{name}=STATUS[xTIMES]"

    def fault(text: str) -> tuple[str, int, int]:
        if not (parts := re.fullmatch(r"(.+)=([2-5]\d\d)(?:x([1-9]\d*))?", text, re.ASCII)):
            raise argparse.ArgumentTypeError(f"{text!r} does not read {metavar}")
        return parts[1], int(parts[2]), int(parts[3] or 1)

    parser.add_argument(
        "--fail",
        type=fault,
        action="append",
        default=[],
        metavar=metavar,
        help="respond to the first TIMES (1) requests for a name like this; can be repeated",
    )
    return parser


def serve(parser: argparse.ArgumentParser, args: argparse.Namespace, api: Api, script: str) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code is 1 if the port cannot be had."""
    options = ("latency", "rate_limit", "rate_window", "port")
    try:
        server = api.practice(**{option: getattr(args, option) for option in options})
        for name, status, times in args.fail:
            server.fail(name, status=status, times=times)
    except ValueError as error:
        parser.error(str(error))

    def show(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(f"{text}\n", end="", flush=True)  # in one piece: two threads call this

    server.on_request = show
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        url, variable = server.start().url, api.variable
        show(
            f"{url}\nIn another terminal: {variable}={url} python {script}\n"
            f'(PowerShell: $env:{variable}="{url}"; cmd: set {variable}={url})'
        )
        while True:
            time.sleep(60)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        server.stop()
        return 0


def main() -> int:
    parser = parser_for("A practice API on 127.0.0.1.", "NAME", rate_limit=5000)
    parser.add_argument("api", metavar="FILE.py:API", help="an Api in a file of yours")
    args = parser.parse_args()
    try:
        api = load_api(args.api)
    except ValueError as error:
        parser.error(str(error))
    return serve(parser, args, api, "YOUR_FLOW.py")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent))  # with `python -P`
    from practice_api import main  # the module that a file of yours takes its Api from

    sys.exit(main())
