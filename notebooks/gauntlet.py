"""The gauntlet: what a flow promises, attacked one promise at a time.

A contestant is a Prefect flow that takes a list of names and prints a line with the number of each,
in the order given. Its run fails if one is missing. The API's address is in an environment
variable; a global concurrency limit says when a request may be sent. An `Api` has the details:
without one it is GitHub's, `{repo}: {count} stars`, `GITHUB_API_URL` and the limit `github-api`.

    run(flow)                              thirteen rounds; returns the board, a DataFrame
    run(flow, lesson=3)                    those of lessons 1 to 3; the others stay grey
    run(flow, "obeys Retry-After", …)      some of them, or of your own: the keys of ROUNDS
    run(flow, STORM)                       whatever can go wrong with a response, in one run
    run(flow, api=Api(…))                  another API than GitHub's; practice_api.py has `Api`
    picture({name: board, …}, "a.png")     boards side by side

    python notebooks/gauntlet.py my_pipeline.py:my_flow [--api my_api.py:API] [PROMISE …]

The command's exit code is 0 if all hold, 1 if not, and 2 for what it cannot run. An API with a key,
the `headers` of its `Api`, has a promise more: KEY.

Each round has a practice API of its own, with names and numbers that no other round has. Each run
is a new process, which is ended if it takes too long. What is judged is the API's log, the lines,
and the state of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sqlite3
import sys
import time
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from threading import Event, Lock
from urllib.parse import quote

import pandas as pd

sys.path.append(os.path.dirname(os.path.realpath(__file__)))  # with `python -P`
import lesson as set_up
import practice_api
from fake_github import GITHUB
from practice_api import Api
from runs import Performance, portable

PATIENCE = 60  # seconds that a run may take
STOPPED = 15  # seconds in which an interrupted run must end
IN_FLIGHT = 16  # requests
TOGETHER = 4  # rounds: more would be in each other's way, at Prefect's server
WIDE = (5000, 5000 / 3600)  # slots, and how many become free a second: holds no request back
LIMIT = Lock()  # held by a round that needs the limit for itself
STORM = "all of it at once"
KEY = "keeps the key to itself"
COLUMNS = "verdict", "evidence", "cure"
HOLDS, FAILS, NOT_REACHED, LATER = "holds", "does not hold", "not reached", "not yet"
MARKS = {
    HOLDS: ("✓", "#1a7f37"),
    FAILS: ("✗", "#b42318"),
    NOT_REACHED: ("\N{EN DASH}", "#6b7280"),
    LATER: ("\N{MIDDLE DOT}", "#b0b5bd"),
}


# --- A round's API, and the runs against it -------------------------------------------------------


@dataclass
class Run:
    """What a run left behind.

    lines: (name, what is said of its number), as printed
    state: the type of the flow run's state; "" if it was ended from outside
    error: the name of the exception in that state, if any; or why it was ended
    log: the API's requests during the run
    wrong: name: what its line has that is not the API's number, in words
    text: its output
    """

    lines: list[tuple[str, str]]
    state: str
    error: str
    log: pd.DataFrame
    wrong: dict[str, str]
    text: str

    def statuses(self, name: str) -> list[int]:
        """The statuses of the answers about a name."""
        return self.log["status"][self.log["name"] == name].tolist()

    def answered(self) -> set[str]:
        return set(self.log["name"][self.log["status"] == 200])

    def printed(self, names: list[str]) -> list[str]:
        """Those of the names that have a line that is right, in the order of the lines."""
        return [name for name, _ in self.lines if name in names and name not in self.wrong]


class Arena:
    """A practice API for one round, its names, and the runs of a flow against it.

    of: what the API is like
    patience: seconds that a run may take
    stop: once it is set, runs are ended
    count: of the names
    options: of the practice API
    """

    def __init__(self, flow, of: Api, patience: float, stop: Event, count: int, **options):
        self.flow, self.of, self.patience, self.stop = flow, of, patience, stop
        self.options = {"latency": 0.05} | options
        first = 100 * secrets.randbelow(10**6)
        self.names = [of.name(first + n) for n in range(count)]
        self.runs: list[Run] = []
        self.used: set[float] = set()  # numbers
        self.mistake = ""  # of the flow, if it is another one than the round looks for
        self.has_limit = False
        self.opened = ExitStack()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_) -> None:
        self.leave_limit()
        self.opened.close()

    def take_limit(self, slots: float, per_second: float) -> None:
        """From here on the limit is this round's alone, and new, with all its slots free."""
        self.has_limit = self.has_limit or LIMIT.acquire()
        set_up.new_limit(self.of.limit, slots, per_second)

    def leave_limit(self) -> None:
        if self.has_limit:
            LIMIT.release()
        self.has_limit = False

    def open(self) -> None:
        """From here on there is another API, with other numbers."""
        self.api = self.opened.enter_context(self.of.practice(**self.options))
        for name in self.names:
            while True:  # small ones too: what the API makes of them may be negative
                number = 1 + secrets.randbelow(secrets.choice([100, 5000, 900_000]))
                if (made := self.of.number(number)) not in self.used:
                    break
            self.used.add(made)
            self.api.numbers[name] = number

    def refuse(self, name: str, seconds: int) -> None:
        """Refuse the next request for a name, and say when to ask again."""
        self.api.fail(name, status=self.of.refusal, headers={"retry-after": seconds})

    def log(self) -> pd.DataFrame:
        return self.api.requests.rename(columns={self.api.column: "name"})

    def run(self, names: list[str] | None = None, watch=None) -> Run:
        """One run. Raises `TypeError` if a new process cannot load the flow.

        watch: a function of the `Performance`; it returns the state and the error
        """
        seen = len(self.log())
        if self.runs and not self.runs[-1].state:
            state, error, text = "", self.runs[-1].error, ""  # it would be as the run before
        else:
            with Performance(self.flow, names or self.names, {self.of.variable: self.api.url}) as p:
                state, error = (watch or self.watch)(p)
                text = p.printed()
        log = self.log().iloc[seen:]
        self.api.mend()
        lines, wrong = self.lines(text), {}
        for name, number in lines:
            if as_number(number) != self.api.number(name):
                has = self.api.number(name)
                wrong[name] = f"printed {number!r:.40} for {name}, the API has {has}"
        self.runs.append(Run(lines, state, error, log, wrong, text))
        return self.runs[-1]

    def lines(self, text: str) -> list[tuple[str, str]]:
        """The lines about the API's names: (name, what is said of its number)."""
        pattern = re.escape(self.of.line)
        for part in "name", "number":
            pattern = pattern.replace(re.escape(f"{{{part}}}"), f"(?P<{part}>.*)")
        found = re.finditer(rf"^{pattern}$", text, re.M)
        return [(m["name"], m["number"]) for m in found if m["name"] in self.names]

    def watch(self, performance: Performance) -> tuple[str, str]:
        """The type of the run's state, "" if it takes too long; and its error."""
        late = "", f"still running after {self.patience} s"
        if not self.until(performance.result, self.patience):
            return late
        performance.ended(10)  # Prefect's server gets its last words
        return performance.result()

    def until(self, happened: Callable[[], object], seconds: float) -> bool:
        """Whether something happened within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (result := happened()):
            if self.stop.is_set() or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return bool(result)

    def judge(
        self, evidence: str, *, attacked: bool, holds: bool, good: list[str], missed: str = ""
    ) -> tuple[str, str]:
        """The verdict, and the evidence.

        attacked: whether the attack is in the log
        holds: whether nothing that was seen speaks against the promise
        good: the names that must have a line
        missed: what to say if the attack is not in the log
        """
        last = self.runs[-1]
        wrong = next((words for run in self.runs for words in run.wrong.values()), "")
        mistake = self.request_mistaken() or self.lines_mistaken() or wrong or self.mistake
        if mistake:
            self.mistake = mistake
            return FAILS, mistake
        if not holds:
            return FAILS, evidence if last.state else last.error
        if not last.state:
            return NOT_REACHED, last.error
        if not attacked:
            error = f" ({last.error})" if last.error else ""
            if all(run.log.empty for run in self.runs):
                return NOT_REACHED, f"sent no request to {self.of.variable}{error}"
            return NOT_REACHED, f"the run ended {missed or 'before the attack'}{error}"
        printed = len(set(last.printed(good)))
        if printed < len(good):
            return NOT_REACHED, f"{evidence}, but printed {printed} of {len(good)}"
        return HOLDS, evidence

    def request_mistaken(self) -> str:
        """A request that the API refused for what it is, if there was no good one."""
        log = pd.concat([run.log for run in self.runs])
        log = log[~log["fault"] & (log["status"] > 0)]
        refused = (log["status"] == self.of.refusal) & (log["remaining"] == 0)
        bad = log[(log["status"] >= 400) & ~refused]
        if bad.empty or (log["status"] < 400).any():
            return ""
        name, status = bad["name"].iloc[0], bad["status"].iloc[0]
        return f"requested {self.of.address(name) if name in self.names else name} ({status})"

    def lines_mistaken(self) -> str:
        """What was printed of good responses, if no line is as it should be."""
        if any(run.lines for run in self.runs):
            return ""
        had = {name: str(self.api.number(name)) for run in self.runs for name in run.answered()}
        for run in self.runs:
            for line in run.text.splitlines():
                if any(name in line and number in line for name, number in had.items()):
                    return f"expected lines like {self.of.line}, not {line!r:.60}"
        completed = any(run.state == "COMPLETED" and run.answered() for run in self.runs)
        return f"expected lines like {self.of.line}" if completed else ""


def as_number(text: str) -> float | None:
    """The number that a line has; None if it is none, as "72,198"."""
    with suppress(ValueError):
        return float(text)


# --- The rounds, in the order of the lessons ------------------------------------------------------


@dataclass
class Round:
    """An attack on one promise, and the section of a lesson that teaches the cure.

    limit: the slots of the API's limit, and how many become free a second. Rounds with a limit of
        their own take turns, after the others.
    arena: the arguments of its `Arena`
    """

    attack: Callable[[Arena], tuple[str, str]]
    cure: str
    limit: tuple[float, float] | None
    arena: dict

    @property
    def lesson(self) -> int:
        return int(self.cure.partition(" ")[0])

    def play(
        self, flow, api: Api, patience: float, stop: Event
    ) -> tuple[tuple[str, str, str], list[Run]]:
        """A row of the board, and the runs. No section cures another mistake than the round's."""
        with Arena(flow, api, patience, stop, **self.arena) as arena:
            if self.limit:
                arena.take_limit(*self.limit)
            arena.open()
            verdict, evidence = self.attack(arena)
            cure = self.cure if verdict == FAILS and evidence != arena.mistake else ""
            return (verdict, evidence, cure), arena.runs


ROUNDS: dict[str, Round] = {}


def promise(words: str, cure: str, limit: tuple[float, float] | None = None, **arena):
    """Make a round of a function that attacks in an arena and returns verdict and evidence.

    Its docstring tells the reader how.
    """

    def add(attack: Callable[[Arena], tuple[str, str]]):
        ROUNDS[words] = Round(attack, cure, limit, arena)
        return attack

    return add


def but(names: list[str], *others: str) -> list[str]:
    return [name for name in names if name not in others]


@promise("one failure loses one result", "1 · One failure, one result", count=6)
def loses_one(arena: Arena) -> tuple[str, str]:
    """The third of six fails, however often it is requested."""
    lost = arena.names[2]
    arena.api.fail(arena.names[0], latency=0.5)
    arena.api.fail(lost, status=500, times=None)
    return in_order(arena, but(arena.names, lost), attacked=lambda run: bool(run.statuses(lost)))


def in_order(arena: Arena, good: list[str], attacked: Callable[[Run], bool]) -> tuple[str, str]:
    """Whether all good ones are printed in the order given, and the run says that it failed."""
    run = arena.run()
    printed = run.printed(good)
    order = "" if printed == [name for name in good if name in printed] else " in another order"
    return arena.judge(
        f"printed {len(printed)} of {len(good)} others{order}, the run {run.state.lower()}",
        attacked=attacked(run),
        holds=not attacked(run) or (printed == good and run.state == "FAILED"),
        good=good,
    )


@promise("retries transient failures", "2 · Three retries", count=4)
def retries(arena: Arena) -> tuple[str, str]:
    """Three fail once or twice: 503, 502, a lost connection."""
    failing = arena.names[:3]
    arena.api.fail(failing[0], status=503, times=2)
    arena.api.fail(failing[1], status=502, html=True)
    arena.api.fail(failing[2], "reset")
    run = arena.run()
    requested = [statuses for name in failing if (statuses := run.statuses(name))]
    recovered = sum(statuses[-1] == 200 for statuses in requested)
    return arena.judge(
        f"recovered from {recovered} of {len(requested)}",
        attacked=len(requested) == 3,
        holds=recovered == len(requested),
        good=arena.names,
    )


@promise("does not retry a 404", "2 · Retry only what is transient", count=4)
def no_retry(arena: Arena) -> tuple[str, str]:
    """Two do not exist: 404 and 451."""
    _, missing, _, blocked = arena.names
    arena.api.fail(missing, status=404, times=None)
    arena.api.fail(blocked, status=451, times=None)
    run = arena.run()
    requests = {"404": len(run.statuses(missing)), "451": len(run.statuses(blocked))}
    most = max(requests.values())
    # Only the most: where the first failure ends the flow, the other one's retries are cancelled.
    often = f"up to {most} requests" if most > 1 else "one request"
    each = " each" if all(requests.values()) else ""
    return arena.judge(
        f"{often}{each} for a {' and a '.join(filter(requests.get, requests))}",
        attacked=all(requests.values()),
        holds=most <= 1,
        good=but(arena.names, missing, blocked),
        missed="at the first of two" if any(requests.values()) else "",
    )


@promise("a slow response delays only itself", "3 · All at once", count=6)
def delays_itself(arena: Arena) -> tuple[str, str]:
    """One response takes an hour."""
    slow = arena.names[1]
    others = but(arena.names, slow)
    arena.api.fail(slow, latency=3600)
    run = arena.run()
    ended = run.log["time"] + run.log["duration"]
    given_up = ended[run.log["name"] == slow].head(1)
    meanwhile = set(run.log["name"][(run.log["status"] == 200) & (ended < given_up.max())])
    return arena.judge(
        f"{len(meanwhile)} of {len(others)} others arrived meanwhile",
        attacked=len(given_up) > 0,
        holds=run.state != "" and (given_up.empty or meanwhile == set(others)),
        good=others,
    )


@promise("at most 16 requests in flight", "3 · Not too many at once", count=24)
def in_flight(arena: Arena) -> tuple[str, str]:
    """24 names; no response is complete while requests arrive."""
    since = {}  # when so many requests were first in flight

    def hold() -> bool:
        count, now = arena.api.in_flight_max, time.monotonic()
        if count > IN_FLIGHT or now - since.setdefault(count, now) > 2:
            arena.api.hold = None
        return arena.api.hold is not None

    arena.api.hold = hold
    run = arena.run()
    holds = arena.api.in_flight_max <= IN_FLIGHT
    return arena.judge(
        f"{'never' if holds else 'was'} more than {IN_FLIGHT}",
        attacked=len(run.log) > IN_FLIGHT,
        holds=holds,
        good=arena.names,
    )


@promise("obeys Retry-After", "4 · When the server says how long to wait", count=3)
def obeys(arena: Arena) -> tuple[str, str]:
    """One is refused, with `retry-after: 5`."""
    refused = arena.names[1]
    arena.refuse(refused, 5)
    log = arena.run().log
    arrived = log["time"][log["name"] == refused].tolist()
    # The response left after the first request arrived: this is never too strict.
    early = len(arrived) > 1 and arrived[1] - arrived[0] < 5
    again = f"{'before' if early else 'after'} the 5 s were over"
    return arena.judge(
        f"the next request came {again}" if len(arrived) > 1 else "no second request",
        attacked=len(arrived) > 0,
        holds=not arrived or (len(arrived) > 1 and not early),
        good=arena.names,
    )


# A limit that frees no slot in that time, so that it counts them: how fast a busy machine sends its
# requests does not matter.
@promise("stays within the rate limit", "4 · A limit of our own", limit=(100, 1 / 3600), count=16)
def within_limit(arena: Arena) -> tuple[str, str]:
    """16 names: is a slot taken for each request?"""
    sent = len(arena.run().log)
    limit = read_limit(arena.of.limit)
    taken = limit.active_slots if limit else 0
    return arena.judge(
        f"{sent} requests, {taken} slots" if taken < sent else "a slot for each request",
        attacked=sent > 0,
        holds=taken >= sent,
        good=arena.names,
    )


@promise("sends nothing if the limit is missing", "4 · A typo in the name", limit=WIDE, count=6)
def not_without_limit(arena: Arena) -> tuple[str, str]:
    """A second run, after the limit has been deleted."""
    before = arena.run(arena.names[:3])
    set_up.delete_limit(arena.of.limit)
    after = arena.run(arena.names[3:])
    made = read_limit(arena.of.limit)
    sent = f"sent {len(after.log)} requests" if len(after.log) else "sent nothing"
    return arena.judge(
        "created the limit first" if made else sent,
        attacked=before.printed(arena.names) == arena.names[:3],
        holds=bool(made) or after.log.empty,
        good=[],
    )


def read_limit(name: str):
    """A global concurrency limit as it is now; None if there is none of that name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        return client.read_global_concurrency_limit_by_name(name)


@promise("never fetches twice", "5 · Fetching once", count=4)
def fetches_once(arena: Arena) -> tuple[str, str]:
    """A second run, after one in which one of four failed."""
    failed = arena.names[1]
    arena.api.fail(failed, status=404, latency=0.5, times=None)  # the others arrive sooner
    began = time.time()
    first, second = arena.run(), arena.run()
    had, again = first.answered(), set(second.log["name"])
    attacked = bool(had and first.statuses(failed))
    evidence = f"fetched {len(again & had)} of {len(had)} again"
    ever = not any("T" in expiration for _, expiration in saved(began))
    if ever and had and not again & had and arena.of is not GITHUB:  # that is lesson 9's
        arena.mistake = "saves results for ever: no cache_expiration"
    return arena.judge(
        evidence if again & had or failed in again else "never retried what had failed",
        attacked=attacked,
        holds=not again & had and (failed in again or not attacked),
        good=arena.names,
    )


@promise("keeps two APIs' caches apart", "5 · What is in the cache key", count=2)
def keeps_apart(arena: Arena) -> tuple[str, str]:
    """A second run, with another API that has other numbers."""
    first = arena.run()
    arena.open()
    second = arena.run()
    if mixed_up := set(second.lines) & set(first.lines):
        second.wrong.clear()
    return arena.judge(
        "printed the first API's numbers" if mixed_up else "printed each API's own numbers",
        attacked=len(first.lines) > 0,
        holds=not mixed_up,
        good=arena.names,
    )


@promise("never caches a bad response", "5 · One bad moment, a day of failures", count=3)
def no_bad_response(arena: Arena) -> tuple[str, str]:
    """Three responses without a number, and a second run."""
    useless, *no_number = arena.names
    arena.api.fail(useless, body={"message": "try later"})
    for name, value in zip(no_number, (None, "n/a"), strict=True):
        body = '{"items": ['
        with suppress(Exception):  # an answer may calculate with the number
            body = json.dumps(arena.of.answer(name, value))
        arena.api.fail(name, body=body)
    first, again = arena.run(), arena.run()
    attacked = bool(first.statuses(useless))
    printed = len(again.printed(arena.names))
    wrong = sorted({repr(text) for name, text in again.lines if name in again.wrong})
    for run in first, again:
        run.wrong.clear()  # a null that is printed once is not what this is about
    return arena.judge(
        f"the next run printed {' and '.join([f'{printed} of {len(arena.names)}', *wrong])}",
        attacked=attacked,
        holds=not attacked or printed == len(arena.names),
        good=arena.names,
    )


# Slots for four at once, and then one each half second: so there are always some left to hold back.
@promise("backs off as a whole", "6 · One refusal", limit=(4, 2), count=12)
def backs_off(arena: Arena) -> tuple[str, str]:
    """The first of twelve requests is refused, with `retry-after: 5`."""
    arena.refuse("*", 5)
    log = arena.run().log
    left = (log["time"] + log["duration"])[log["fault"]].min()
    # Two seconds for those that were already on their way, also on a busy machine.
    early = (log["time"] > left + 2) & (log["time"] < left + 5)
    later = log["time"] >= left + 5
    return arena.judge(
        f"{'more' if early.any() else 'no'} requests in seconds 2 to 5 of the wait",
        attacked=log["name"][later].nunique() > 1,
        holds=not early.any(),
        good=arena.names,
    )


@promise("stops within seconds", "6 · Stopping a run", limit=(3, 1 / 120), count=8)
def stops(arena: Arena) -> tuple[str, str]:
    """A run that waits for a slot is stopped, as by ■."""
    sent = []

    def interrupt(performance: Performance) -> tuple[str, str]:
        if not arena.until(lambda: performance.result() or is_quiet(arena), arena.patience):
            return "", f"still running after {arena.patience} s"
        if performance.result():
            return performance.result()
        performance.interrupt()
        sent.append(len(arena.log()))
        ended = arena.until(performance.result, 5)
        arena.take_limit(*WIDE)  # a task that still waits would send now
        time.sleep(1)
        if not ended:
            arena.leave_limit()  # other rounds need not wait
            if ended := arena.until(performance.result, STOPPED - 6):
                arena.take_limit(*WIDE)
        sent.append(len(arena.log()))
        return performance.result() if ended else ("", f"still running after {STOPPED} s")

    had = arena.run(watch=interrupt).answered()
    again = len(had & set(arena.run().log["name"]))
    more = f"sent {sent[1] - sent[0]} more" if sent and sent[1] > sent[0] else "sent nothing more"
    attacked = bool(sent) and len(had) < len(arena.names)
    stopped = arena.runs[0].state != "" and more == "sent nothing more"
    return arena.judge(
        f"ended within {STOPPED} s, {more}, then fetched {again} of {len(had)} again",
        attacked=attacked,
        holds=not attacked or (stopped and not again),
        good=arena.names,
    )


def is_quiet(arena: Arena) -> bool:
    """Whether there were requests, and then none for two seconds."""
    count = len(arena.log())
    return count > 0 and not arena.until(lambda: len(arena.log()) > count, 2)


@promise(STORM, "6 · Stopping a run", count=16)
def storm(arena: Arena) -> tuple[str, str]:
    """Ten faults in one run of sixteen names."""
    names = iter(arena.names)
    arena.api.fail(next(names), latency=0.5)
    arena.api.fail(next(names), status=503, times=2)
    arena.api.fail(missing := next(names), status=404, times=None)
    arena.api.fail(next(names), status=502, html=True)
    arena.api.fail(next(names), latency=3600)
    arena.api.fail(next(names), "reset")
    arena.refuse(next(names), 2)
    arena.api.fail(next(names), "truncated")
    arena.api.fail(useless := next(names), body={"message": "try later"})
    arena.api.fail(blocked := next(names), status=451, times=None)
    good = but(arena.names, missing, useless, blocked)
    return in_order(arena, good, attacked=lambda run: bool(run.statuses(arena.names[1])))


PROMISES = tuple(ROUNDS)  # of the course; one of your own is played if it is named


def keeps_key(arena: Arena) -> tuple[str, str]:
    """Three of four fail: 404, 503 once, no number. Then the key is looked for."""
    missing, failing, useless, _ = arena.names
    arena.api.fail(missing, status=404, times=None)
    arena.api.fail(failing, status=503)
    arena.api.fail(useless, body={"message": "try later"}, times=None)
    began = time.time()
    run = arena.run()
    keys = {str(value).split()[-1] for value in arena.of.headers.values()}
    keys |= {quote(key, safe="") for key in keys}
    found = [
        place
        for place, texts in left_behind(run, began).items()
        if any(key in text for key in keys for text in texts)
    ]
    return arena.judge(
        f"the key is in {', '.join(found) or 'no output, log, state or saved result'}",
        attacked=bool(run.statuses(missing)),
        holds=not found,
        good=but(arena.names, missing, useless),
    )


def left_behind(run: Run, began: float) -> dict[str, list[str]]:
    """place: what a run left there, as text. What Prefect's server has since then counts."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, LogFilter

    since = {"after_": datetime.fromtimestamp(began, UTC)}
    with get_client(sync_client=True) as client:
        these = FlowRunFilter(start_time=since)
        for _ in range(10):
            time.sleep(1)  # the server records task runs in batches
            flow_runs = client.read_flow_runs(flow_run_filter=these)
            task_runs = client.read_task_runs(flow_run_filter=these)
            if task_runs and all(one.state.is_final() for one in [*flow_runs, *task_runs]):
                break
        logs = client.read_logs(LogFilter(timestamp=since))
    return {
        "the output": [run.text],
        "Prefect's logs": [record.message for record in logs],
        "Prefect's states": [record.model_dump_json() for record in [*flow_runs, *task_runs]],
        "saved results": [text for text, _ in saved(began)],
    }


def saved(began: float) -> list[tuple[str, str]]:
    """The results that were saved since then, as text, and when each expires, "None" if never."""
    found = []
    for path in set_up.STORAGE.rglob("*"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of a file that is no result
            if path.stat().st_mtime > began:
                record = json.loads(text := path.read_text())
                with suppress(ValueError):  # what was saved as JSON is in the text already
                    text += b64decode(record["result"]).decode(errors="replace")
                found.append((f"{path.name} {text}", str(record["metadata"]["expiration"])))
    return found


KEYED = {KEY: Round(keeps_key, "9 · Where a key lives", WIDE, {"count": 4})}


def rounds_for(api: Api) -> dict[str, Round]:
    """Those that a flow for this API may be sent through."""
    return ROUNDS | (KEYED if api.headers else {})


# --- The board ------------------------------------------------------------------------------------

LEFT = 'style="text-align: left"'
BADGE = "color: white; padding: 1px 8px; border-radius: 9px; white-space: nowrap"


class Coloured:
    """A table whose verdicts are coloured in a notebook, and the same as plain text elsewhere.

    title: stands above the table
    rows: their cells; one that is a verdict, a key of MARKS, gets its mark and its colour
    text: the plain text
    """

    def __init__(self, title: str, rows, text: str):
        self.title, self.rows, self.text = title, rows, text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        rows = "\n".join(f"<tr>{''.join(map(coloured, row))}</tr>" for row in self.rows)
        return f"<b>{escape(self.title)}</b>\n<table>\n{rows}\n</table>"


def coloured(text: str) -> str:
    """A cell of a table, in HTML."""
    if text not in MARKS:
        return f"<td {LEFT}>{escape(text)}</td>"
    mark, colour = MARKS[text]
    return f'<td {LEFT}><span style="background: {colour}; {BADGE}">{mark} {text}</span></td>'


class Board(pd.DataFrame):
    """A row for each promise: verdict, evidence and, where it does not hold, the cure."""

    def shown(self) -> Coloured:
        """As a table in colour, and as text."""
        held = (self["verdict"] == HOLDS).sum()
        title = f"{self.attrs['flow']}: {held} of {len(self)}"
        rows = [(row.verdict or "…", *row[:1], *row[2:]) for row in self.itertuples()]
        widths = [max(len(row[n]) for row in rows) for n in (1, 2)]
        lines = [title]
        for verdict, words, evidence, cure in rows:
            mark = MARKS[verdict][0] if verdict in MARKS else " "
            text = f"{mark} {verdict:<13}  {words:<{widths[0]}}  {evidence:<{widths[1]}}"
            lines.append(f"{text}  {cure and '→'} {cure}".rstrip())
        rows = [(*row[:3], row[3] and f"→ {row[3]}") for row in rows]
        return Coloured(title, rows, "\n".join(lines))

    def __repr__(self) -> str:
        return repr(self.shown())

    def _repr_html_(self) -> str:
        return self.shown()._repr_html_()


def run(
    flow, *promises: str, lesson: int = 0, api: Api = GITHUB, patience: float = PATIENCE
) -> Board:
    """Send a flow through the rounds of these promises, or through those of lessons 1 to 6.
    An API with a key has one more.

    lesson: play the rounds of this lesson and of those before it only
    api: what the flow sends its requests to
    patience: seconds that a run may take before it is ended

    Returns a row for each promise: verdict, evidence and, where it does not hold, the section of a
    lesson that has the cure. Raises `TypeError` for what is no flow or cannot run in another
    process, and `ValueError` for a promise that there is not.
    """
    if not isinstance(api, Api):
        raise TypeError(f"api must be an Api (practice_api.py has it), not {api!r:.80}")
    rounds = rounds_for(api)
    if unknown := [words for words in promises if words not in rounds]:
        raise ValueError(f"No such promise: {', '.join(unknown)}. There are: {', '.join(rounds)}.")
    contestant = portable(flow)
    if "PREFECT_API_URL" not in os.environ:  # a script, which has no set-up cell
        with redirect_stdout(sys.stderr):
            set_up.start()
    usual = (*but(PROMISES, STORM), KEY)
    chosen = [words for words in rounds if words in (promises or usual)]
    board = Board("", index=chosen, columns=list(COLUMNS))
    board.attrs["flow"] = flow.fn.__name__
    for words in chosen:
        if lesson and rounds[words].lesson > lesson:
            board.loc[words] = LATER, f"lesson {rounds[words].lesson}", ""
    now = [words for words in chosen if not board["verdict"][words]]
    rows = closing(played(now, contestant, api, patience))
    with Live(board) as live, turn(), same_limit(api.limit), rows as results:
        for words, row in results:
            board.loc[words] = row
            live.update(words)
    return board


@contextmanager
def turn():
    """Wait until no other board is played: they would set the same limit."""
    waits = False
    with closing(sqlite3.connect(set_up.HOME / "turn.db", timeout=0.2)) as lock:
        while True:
            try:
                lock.execute("BEGIN EXCLUSIVE")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
            if not waits:
                waits = True
                print("Another board is being played. This one comes next.", file=sys.stderr)
        yield


@contextmanager
def same_limit(name: str):
    """Leave the limit behind as it was."""
    before = read_limit(name)
    try:
        set_up.new_limit(name, *WIDE)
        yield
    finally:
        set_up.delete_limit(name)
        if before:
            set_up.new_limit(name, before.limit, before.slot_decay_per_second)
            if not before.active:
                set_up.switch_off_limit(name)


def played(chosen: list[str], *arguments):
    """Play rounds; yield (promise, its row of the board) as soon as each is over."""
    contestant, api, patience = arguments
    stop, ended = Event(), []
    rounds = rounds_for(api)
    together = [words for words in chosen if not rounds[words].limit]

    def play(words: str) -> tuple[str, str, str]:
        if hangs:
            return NOT_REACHED, "no run came to its end", ""
        row, runs = rounds[words].play(contestant, api, patience, stop)
        ended.extend(run.state != "" for run in runs)
        return row

    # The last one first: while it waits for a run to stop, another one has the limit.
    for some, workers in (together, TOGETHER), (but(chosen, *together)[::-1], 2):
        hangs = bool(ended) and not any(ended)
        with ThreadPoolExecutor(workers) as pool:
            try:
                futures = {pool.submit(play, words): words for words in some}
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:  # of a round, or of the reader who interrupts the cell
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class Live:
    """The board while it is played: in a notebook it fills up, elsewhere a line for each round.

    At the end it is gone: the board itself is the result of the cell.
    """

    def __init__(self, board: Board):
        self.board, self.handle = board, None

    def __enter__(self) -> Live:
        from IPython import display, get_ipython

        if hasattr(get_ipython(), "kernel"):
            self.handle = display.display({"text/html": ""}, raw=True, display_id=True)
            self.handle.update(self.board.shown())
        return self

    def update(self, words: str) -> None:
        if self.handle:
            self.handle.update(self.board.shown())
        else:
            mark = MARKS[self.board["verdict"][words]][0]
            print(mark, words, file=sys.stderr, flush=True)

    def __exit__(self, error, *_) -> None:
        if self.handle and not error:
            self.handle.update({"text/html": ""}, raw=True)


def picture(boards: dict[str, Board], path: str | os.PathLike | None = None) -> None:
    """Draw boards side by side, a row for each promise; save the picture if there is a path."""
    from matplotlib import pyplot as plt

    import charts

    promises = list(dict.fromkeys(words for board in boards.values() for words in board.index))
    figure, axes = plt.subplots(figsize=(3.4 + 1.2 * len(boards), 0.8 + 0.3 * len(promises)))
    held = []
    for x, (name, board) in enumerate(boards.items()):
        for y, words in enumerate(promises):
            if words in board.index:
                mark, colour = MARKS[board["verdict"][words]]
                axes.add_patch(plt.Rectangle((x + 0.04, y + 0.08), 0.92, 0.84, color=colour))
                axes.text(x + 0.5, y + 0.5, mark, color="white", ha="center", va="center")
        held.append(f"{name}\n{(board['verdict'] == HOLDS).sum()} of {len(board)}")
    axes.set(xlim=(0, len(boards)), ylim=(len(promises), 0))
    axes.set_xticks([x + 0.5 for x in range(len(boards))], held)
    axes.set_yticks([y + 0.5 for y in range(len(promises))], promises)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    if path is not None:
        figure.savefig(path)
    charts.show(figure, "Which promises hold: " + ", ".join(held).replace("\n", " "))


# --- Lesson 7 -------------------------------------------------------------------------------------


def verdict(holds: bool, reached: bool = True) -> str:
    """What to say of a claim; one that was not reached can neither hold nor fail."""
    return (HOLDS if holds else FAILS) if reached else NOT_REACHED


def tell(*claims: tuple[str, str, object]) -> Coloured:
    """A line for each claim: its verdict, its words, the evidence. And whether all hold."""
    title = "Solved." if all(what == HOLDS for _, what, _ in claims) else "Not yet."
    rows = [(what, words, str(evidence)) for words, what, evidence in claims]
    lines = [f"{what:<13} | {words}: {evidence}" for words, what, evidence in claims]
    return Coloured(title, rows, "\n".join([*lines, title]))


def mornings(github, morning, history) -> Coloured:
    """Whether a flow keeps what a failed morning has fetched, tells of it, and can be repeated.

    morning: a flow that takes repositories and a day, and posts to WEBHOOK_URL if it fails
    history: the file to which it appends `day,repository,stars`
    """
    from pipeline import REPOS

    figures = {repo: secrets.randbelow(10**6) for repo in REPOS}
    set_up.clear_cache()
    history.unlink(missing_ok=True)
    os.environ["WEBHOOK_URL"], heard = set_up.webhook()
    github.reset()
    github.fail(REPOS[1], status=404)
    for repo, stars in figures.items():
        github.fail(repo, fields={"stargazers_count": stars}, times=None)
    states, rows = [], []
    with set_up.quiet(), redirect_stdout(None):
        for day in ("2026-01-25",) * 3 + ("2026-01-26",):
            states.append(morning(REPOS, day, return_state=True))
            rows.append(sorted(history.read_text().splitlines()) if history.exists() else [])
    set_up.clear_cache()
    github.reset()
    first, second, third, next_day = rows
    whole = sorted(f"2026-01-25,{repo},{stars}" for repo, stars in figures.items())
    kept = [row for row in whole if REPOS[1] not in row]
    both = whole + [row.replace("01-25", "01-26") for row in whole]
    failed = states[0].is_failed()
    named = len(heard) == 1 and REPOS[1] in heard[0]
    added = [f"added {len(now) - len(before)} rows" for before, now in pairwise(rows)]
    return tell(
        (
            "a 404 loses only its own row",
            verdict(first == kept),
            f"kept {len({*first} & {*kept})} of {len(kept)} others",
        ),
        ("that run fails", verdict(failed), states[0].type.value),
        (
            "the message names the failed repository",
            verdict(named, failed),
            " ".join(heard).replace("\n", " ") or "no message",
        ),
        (
            "a second run adds the missing row",
            verdict(second == whole, first == kept),
            added[0] if first == kept else "judged once the first line holds",
        ),
        ("a third run adds nothing", verdict(third == second, bool(second)), added[1]),
        (
            "the next day adds three rows",
            verdict(next_day == both, third == whole),
            added[2] if third == whole else "judged once the first day has three rows",
        ),
    )


# --- The command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Attack a flow, and print which promises it keeps.",
        epilog=f"promises: {', '.join(ROUNDS)}",
    )
    parser.add_argument("flow", metavar="FILE.py:FLOW", help="a flow in a file of yours")
    parser.add_argument("promises", nargs="*", metavar="PROMISE", help="all but the last, if none")
    parser.add_argument("--api", metavar="FILE.py:API", help="an Api in a file; else GitHub's")
    args = parser.parse_intermixed_args(argv)  # promises may follow --api
    try:
        api = practice_api.load_api(args.api) if args.api else GITHUB
        board = run(practice_api.load(args.flow), *args.promises, api=api)
    except (TypeError, ValueError, set_up.SetupError) as error:
        print(error, file=sys.stderr)
        return 2
    print(board)
    return int((board["verdict"] != HOLDS).any())


if __name__ == "__main__":
    from gauntlet import main  # the module that a file of yours may import

    sys.exit(main())
