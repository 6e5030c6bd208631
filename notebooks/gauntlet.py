"""The rounds of lesson 8: what a flow promises, attacked one promise at a time.

A contestant is a Prefect flow that takes a list of repositories and prints `{repo}: {count} stars`
for each, in the order asked. Its run fails if one is missing. The API is at the address in the
environment variable `GITHUB_API_URL`; the limit `github-api` says when a request may be sent.

    run(flow)                              all rounds; returns the board, a DataFrame
    run(flow, "waits as told", …)          some of them: the keys of ROUNDS
    run(flow, STORM)                       whatever can go wrong with an answer, in one run
    chart({name: board, …})                what each contestant asked of the API

Each round has a practice API of its own, with repositories and star counts that no other round has.
Each run is a new process, which is ended if it takes too long. What is judged is the API's log, the
lines, and the state of the run.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import multiprocessing
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import lesson
from exercises import FAILS, HOLDS, NOT_REACHED
from fake_github import FakeGitHub

if TYPE_CHECKING:  # the processes of the runs do without it
    import pandas as pd

PATIENCE = 40  # seconds that a run may take
AT_ONCE = 16  # requests
LIMIT = "github-api"
WIDE = (5000, 5000 / 3600)  # slots, and how many become free a second: holds nobody back
STORM = "all of it at once"
COLUMNS = "verdict", "evidence"

# A fork of a process that has imported Prefect starts at once. macOS's libraries may not stand it.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# With what Prefect imports only when the first flow runs.
ENGINES = ["prefect.flow_engine", "prefect.task_engine", "prefect.utilities.visualization"]
PROCESSES.set_forkserver_preload(["gauntlet", "cloudpickle", "fastapi", *ENGINES])


# --- A run, in a process of its own ---------------------------------------------------------------


@dataclass
class Run:
    """What a run left behind.

    lines: (repository, what is said of its count), as printed
    state: the type of the flow run's state; "" if it was ended from outside
    error: the name of the exception in that state, if any; or why it was ended
    log: the API's requests during the run
    wrong: whether a line has a count that is not the API's
    """

    lines: list[tuple[str, str]]
    state: str
    error: str
    log: pd.DataFrame
    wrong: bool

    def statuses(self, repo: str) -> list[int]:
        """The statuses of the answers about a repository."""
        return self.log["status"][self.log["repository"] == repo].tolist()

    def printed(self, repos: list[str]) -> list[str]:
        """Those of the repositories that have a line, in the order of the lines."""
        return [repo for repo, _ in self.lines if repo in repos]


def perform(
    flow: bytes, repos: list[str], environment: dict, settings, output: str, answer
) -> None:
    """Run the flow in this process; send its state's type and its error's name."""
    os.environ.clear()  # this process may be a fork of an older one
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(output, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    import cloudpickle
    import prefect.context

    # Those that the kernel has now, with what `lesson.start` sets.
    prefect.context.GLOBAL_SETTINGS_CONTEXT = settings
    # Log lines count as printed: the flow may have `log_prints=True`.
    logging.getLogger().handlers[:] = [logging.StreamHandler(sys.stdout)]
    try:
        contestant = cloudpickle.loads(flow)
    except Exception as error:
        answer.send(("", f"{type(error).__name__}: {error}"))
        return
    try:
        state = contestant(repos, return_state=True)
        if inspect.iscoroutine(state):
            state = asyncio.run(state)
        error = state.result(raise_on_failure=False)
        name = type(error).__name__ if isinstance(error, BaseException) else ""
        answer.send((state.type.value, name))
    except BaseException as error:
        answer.send(("CRASHED", type(error).__name__))


def pickled(flow) -> bytes:
    """The flow for another process. Raises `TypeError` if it is no flow, or cannot be sent."""
    import cloudpickle
    from prefect import Flow

    if not isinstance(flow, Flow):
        kind = "a function without it" if inspect.isfunction(flow) else repr(type(flow).__name__)
        raise TypeError(f"The gauntlet takes a flow, a function with @flow above it, not {kind}.")
    try:
        return cloudpickle.dumps(flow)
    except Exception as error:
        raise TypeError(
            f"The flow cannot be sent to another process ({error}). Let it use neither `github` "
            "nor an HTTP client made outside of it: the API is at os.environ['GITHUB_API_URL']."
        ) from None


class Arena:
    """A practice API for one round, its repositories, and the runs of a flow against it.

    count: of the repositories
    patience: seconds that a run may take
    stop: once it is set, runs are ended
    api: the arguments of its `FakeGitHub`
    """

    def __init__(self, flow: bytes, patience: float, stop: Event, count: int, **api):
        self.flow, self.patience, self.stop = flow, patience, stop
        self.options = {"latency": 0.05} | api
        name = secrets.token_hex(4)
        self.repos = [f"load-test/{name}-{n:02}" for n in range(count)]
        self.runs: list[Run] = []

    def __enter__(self) -> Arena:
        self.api = FakeGitHub(**self.options).start()
        self.counts = {repo: str(1000 + secrets.randbelow(900_000)) for repo in self.repos}
        return self

    def __exit__(self, *_) -> None:
        self.api.stop()

    def fail(self, repo: str, kind: str | None = None, **fault) -> None:
        """As `FakeGitHub.fail`; if the answer has a count after all, it is the arena's."""
        self.api.fail(repo, kind, fields={"stargazers_count": int(self.counts[repo])}, **fault)

    def run(self, repos: list[str] | None = None) -> Run:
        """One run. Raises `TypeError` if a new process cannot load the flow."""
        for repo in self.repos:  # after whatever else goes wrong with it
            self.fail(repo, times=None)
        seen = len(self.api.requests)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            output = Path(folder, "output")
            state, error = self.start(repos or self.repos, output)
            text = output.read_text(encoding="utf-8") if output.exists() else ""
        log = self.api.requests.iloc[seen:]
        self.api.mend()
        lines = re.findall(r"^(\S+/\S+): (.*) stars$", text, re.M)
        wrong = any(self.counts.get(repo) != count for repo, count in lines)
        self.runs.append(Run(lines, state, error, log, wrong))
        return self.runs[-1]

    def start(self, repos: list[str], output: Path) -> tuple[str, str]:
        """The type of the run's state, "" if it was ended from outside; and its error."""
        late = "", f"still running after {self.patience} s"
        if self.runs and not self.runs[-1].state:
            return late  # as the run before
        from prefect.context import get_settings_context

        environment = dict(os.environ) | {"GITHUB_API_URL": self.api.url}
        receiving, sending = PROCESSES.Pipe(duplex=False)
        arguments = self.flow, repos, environment, get_settings_context(), str(output), sending
        process = PROCESSES.Process(target=perform, args=arguments)
        process.start()
        sending.close()
        try:
            deadline = time.monotonic() + self.patience
            while not receiving.poll(0.1):
                if self.stop.is_set() or time.monotonic() > deadline:
                    return late
            state, error = receiving.recv()
            process.join(10)  # until Prefect's server has its last words
        except EOFError:
            return "CRASHED", "its process ended"
        finally:
            process.kill()
            process.join()
            receiving.close()
        if not state:
            raise TypeError(f"A new process cannot load the flow: {error}")
        return state, error

    def judge(
        self, evidence: str, *, attacked: bool, holds: bool, good: list[str]
    ) -> tuple[str, str]:
        """The verdict, and the evidence.

        attacked: whether the attack is in the log
        holds: whether nothing that was seen speaks against the promise
        good: the repositories that must have a line
        """
        last = self.runs[-1]
        if not holds:
            return FAILS, evidence if last.state else last.error
        if any(run.wrong for run in self.runs):
            return FAILS, "printed a count that is not the API's"
        if not last.state:
            return NOT_REACHED, last.error
        if not attacked:
            error = f" ({last.error})" if last.error else ""
            return NOT_REACHED, f"the run ended before it{error}"
        printed = len(set(last.printed(good)))
        if printed < len(good):
            return NOT_REACHED, f"{evidence}; {printed} of {len(good)} lines"
        return HOLDS, evidence


# --- The rounds -----------------------------------------------------------------------------------


@dataclass
class Round:
    """An attack on one promise, and the section of a lesson that has the cure.

    limit: the slots of `github-api`, and how many become free a second. A round with a limit of its
        own takes place alone.
    arena: the arguments of its `Arena`
    """

    attack: Callable[[Arena], tuple[str, str]]
    cure: str
    limit: tuple[int, float] | None
    arena: dict

    def play(self, flow: bytes, patience: float, stop: Event) -> tuple[str, str, list[Run]]:
        with Arena(flow, patience, stop, **self.arena) as arena:
            return *self.attack(arena), arena.runs


ROUNDS: dict[str, Round] = {}


def promise(words: str, cure: str, limit: tuple[int, float] | None = None, **arena):
    """Make a round of a function that attacks in an arena and returns verdict and evidence.

    Its docstring tells the reader how.
    """

    def add(attack: Callable[[Arena], tuple[str, str]]):
        ROUNDS[words] = Round(attack, cure, limit, arena)
        return attack

    return add


def but(repos: list[str], *others: str) -> list[str]:
    return [repo for repo in repos if repo not in others]


@promise("heals what can heal", "2 · Three retries", count=4)
def heals(arena: Arena) -> tuple[str, str]:
    """Three answer badly once or twice: 503, 502, a lost connection."""
    ill = arena.repos[:3]
    arena.fail(ill[0], status=503, times=2)
    arena.fail(ill[1], status=502, html=True)
    arena.fail(ill[2], "reset")
    run = arena.run()
    attempts = [run.statuses(repo) for repo in ill]
    return arena.judge(
        ", ".join(" ".join(str(n or "reset") for n in a) or "never asked" for a in attempts),
        attacked=all(attempts),
        holds=all(a[-1] == 200 for a in attempts if a),
        good=arena.repos,
    )


@promise("asks once what cannot", "2 · Retry only what can heal", count=4)
def asks_once(arena: Arena) -> tuple[str, str]:
    """Two cannot be had: 404 and 451."""
    _, missing, _, blocked = arena.repos
    arena.fail(missing, status=404, times=None)
    arena.fail(blocked, status=451, times=None)
    run = arena.run()
    asked = {"404": len(run.statuses(missing)), "451": len(run.statuses(blocked))}
    most = max(asked.values())
    # Only the most: where the first failure ends the flow, the other one's retries are cancelled.
    often = f"up to {most} times" if most > 1 else "once"
    return arena.judge(
        f"{' and '.join(filter(asked.get, asked))} asked {often}",
        attacked=all(asked.values()),
        holds=most <= 1,
        good=but(arena.repos, missing, blocked),
    )


@promise("waits as told", "2 · The finished form", count=3)
def waits(arena: Arena) -> tuple[str, str]:
    """One is refused, and `retry-after` says for how long."""
    told = arena.repos[1]
    arena.fail(told, "secondary rate limit", headers={"retry-after": 5})
    log = arena.run().log
    arrived = log["time"][log["repository"] == told].tolist()
    # The answer left after the first request arrived: this is never too strict.
    early = len(arrived) > 1 and arrived[1] - arrived[0] < 5
    again = f"{'before' if early else 'after'} the 5 s were over"
    return arena.judge(
        f"asked again {again}" if len(arrived) > 1 else "not asked again",
        attacked=len(arrived) > 0,
        holds=not arrived or (len(arrived) > 1 and not early),
        good=arena.repos,
    )


@promise("does not hang", "3 · All at once", count=6)
def does_not_hang(arena: Arena) -> tuple[str, str]:
    """One answer takes an hour."""
    slow = arena.repos[1]
    others = but(arena.repos, slow)
    arena.fail(slow, latency=3600)
    run = arena.run()
    ended = run.log["time"] + run.log["duration"]
    given_up = ended[run.log["repository"] == slow].head(1)
    meanwhile = set(run.log["repository"][(run.log["status"] == 200) & (ended < given_up.max())])
    return arena.judge(
        f"{len(meanwhile)} of {len(others)} others meanwhile",
        attacked=len(given_up) > 0,
        holds=run.state != "" and (given_up.empty or meanwhile == set(others)),
        good=others,
    )


@promise("loses one for one", "3 · One failure, one result lost", count=6)
def loses_one(arena: Arena) -> tuple[str, str]:
    """One of six fails, however often it is asked."""
    lost = arena.repos[2]
    others = but(arena.repos, lost)
    arena.fail(arena.repos[0], latency=0.5)
    arena.fail(lost, status=500, times=None)
    return in_order(arena, others, attacked=lambda run: bool(run.statuses(lost)))


def in_order(arena: Arena, good: list[str], attacked: Callable[[Run], bool]) -> tuple[str, str]:
    """Whether all good ones are printed in the order asked, and the run says that it failed."""
    run = arena.run()
    printed = run.printed(good)
    order = "" if printed == sorted(printed) else ", out of order"
    return arena.judge(
        f"{len(printed)} of {len(good)} others{order}; the run {run.state.lower()}",
        attacked=attacked(run),
        holds=not attacked(run) or (printed == good and run.state == "FAILED"),
        good=good,
    )


@promise("is not too many at once", "3 · Not too many at once", limit=WIDE, count=24, latency=3)
def not_too_many(arena: Arena) -> tuple[str, str]:
    """24 repositories, and an API that takes 16 requests at once."""

    def quick(_):
        arena.api.latency = 0.05

    arena.api.on_request = quick  # from the first answer on: all that come before it are slow
    run = arena.run()
    holds = arena.api.in_flight_max <= AT_ONCE
    return arena.judge(
        f"{'never' if holds else 'was'} more than {AT_ONCE} at once",
        attacked=len(run.log) > AT_ONCE,
        holds=holds,
        good=arena.repos,
    )


@promise("is not poisoned", "5 · A trap worth knowing", count=3)
def not_poisoned(arena: Arena) -> tuple[str, str]:
    """Two useless answers with status 200, and a second run."""
    useless, truncated, _ = arena.repos
    arena.fail(useless, body={"message": "try later"})
    arena.fail(truncated, body='{"stargazers_count": 1')
    attacked = bool(arena.run().statuses(useless))
    healthy = len(arena.run().printed(arena.repos))
    return arena.judge(
        f"{healthy} of {len(arena.repos)} lines the next time",
        attacked=attacked,
        holds=not attacked or healthy == len(arena.repos),
        good=arena.repos,
    )


@promise("pays once", "5 · Asking once", count=4)
def pays_once(arena: Arena) -> tuple[str, str]:
    """A second run, after one in which one of four failed."""
    failed = arena.repos[1]
    arena.fail(failed, status=404, latency=0.5, times=None)  # the others answer sooner
    first, second = arena.run(), arena.run()
    paid = set(first.log["repository"][first.log["status"] == 200])
    again = set(second.log["repository"])
    attacked = bool(paid and first.statuses(failed))
    evidence = f"asked again for {len(again & paid)} of {len(paid)} it had"
    return arena.judge(
        evidence if again & paid or failed in again else "never again asked for what failed",
        attacked=attacked,
        holds=not again & paid and (failed in again or not attacked),
        good=arena.repos,
    )


@promise("keeps two APIs apart", "5 · What is in the key", count=2)
def keeps_apart(arena: Arena) -> tuple[str, str]:
    """A second run, with another API, whose counts are others."""
    first, old = arena.run(), arena.counts
    with arena.api, arena:  # another API, with other counts; the first one keeps its address
        mixed_up = set(arena.run().lines) & set(old.items())
    return arena.judge(
        "the first API's counts" if mixed_up else "each API's own counts",
        attacked=len(first.lines) > 0,
        holds=not mixed_up,
        good=arena.repos,
    )


# In any 3 seconds the limit grants 3 + 3 * 3 = 12 slots. The API answers 15 requests, since a slot
# may be used a moment late.
@promise(
    "is never refused",
    "4 · A limit of our own",
    limit=(3, 3),
    **{"count": 17, "latency": 0, "rate_limit": 15, "rate_window": 3},
)
def never_refused(arena: Arena) -> tuple[str, str]:
    """An API that answers 15 requests in 3 seconds, a limit that fits."""
    log = arena.run().log
    refused = (log["status"] == 403) & (log["remaining"] == 0) & ~log["fault"]
    return arena.judge(
        "a 403 with nothing remaining" if refused.any() else "no request refused",
        attacked=len(log) > arena.api.rate_limit,
        holds=not refused.any(),
        good=arena.repos,
    )


@promise("asks nobody without a limit", "4 · Limits that hold nothing back", limit=WIDE, count=6)
def not_without_limit(arena: Arena) -> tuple[str, str]:
    """A second run, with no limit any more on Prefect's server."""
    before = arena.run(arena.repos[:3])
    lesson.delete_limit(LIMIT)
    after = arena.run(arena.repos[3:])
    made = limit_is_there()
    without = f"{len(after.log)} requests, no limit" if len(after.log) else "no limit, no request"
    return arena.judge(
        "made the limit first" if made else without,
        attacked=before.printed(arena.repos) == arena.repos[:3],
        holds=made or after.log.empty,
        good=[],
    )


@promise(STORM, "6 · The finished pipeline", count=16)
def storm(arena: Arena) -> tuple[str, str]:
    """Ten faults in one run of sixteen repositories."""
    for repo, fault in zip(
        arena.repos,
        (
            {"latency": 0.5},
            {"status": 503, "times": 2},
            {"status": 404, "times": None},
            {"status": 502, "html": True},
            {"latency": 3600},
            {"kind": "reset"},
            {"kind": "secondary rate limit", "headers": {"retry-after": 2}},
            {"kind": "truncated"},
            {"body": {"message": "try later"}},
            {"status": 451, "times": None},
        ),
        strict=False,
    ):
        arena.fail(repo, **fault)
    good = but(arena.repos, *(arena.repos[n] for n in (2, 8, 9)))
    return in_order(arena, good, attacked=lambda run: bool(run.statuses(arena.repos[1])))


def limit_is_there() -> bool:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        return bool(client.read_global_concurrency_limit_by_name(LIMIT))
    return False


# --- The board ------------------------------------------------------------------------------------


def run(flow, *promises: str, patience: float = PATIENCE) -> pd.DataFrame:
    """Send a flow through the rounds of these promises, or through all of them but the storm.

    patience: seconds that a run may take before it is ended

    Returns a row for each promise: verdict, evidence and, unless it holds, the section of a lesson
    that has the cure. Raises `TypeError` for what is no flow or cannot run in another process, and
    `ValueError` for a promise that there is not.
    """
    import pandas as pd

    if unknown := set(promises) - set(ROUNDS):
        raise ValueError(f"No such promise: {', '.join(unknown)}. There are: {', '.join(ROUNDS)}.")
    arguments = pickled(flow), patience, (stop := Event())
    rounds = {words: ROUNDS[words] for words in ROUNDS if words in (promises or but(ROUNDS, STORM))}
    together = [words for words in rounds if not rounds[words].limit]
    played = {}
    try:
        lesson.new_limit(LIMIT, *WIDE)
        with ThreadPoolExecutor(max_workers=len(ROUNDS)) as pool:
            try:
                results = pool.map(lambda words: rounds[words].play(*arguments), together)
                played |= zip(together, results, strict=True)
            except BaseException:  # of a round, or of the reader who interrupts the cell
                stop.set()
                raise
        runs = [run for *_, runs in played.values() for run in runs]
        hangs = bool(runs) and not any(run.state for run in runs)
        for words in but(rounds, *together):
            lesson.new_limit(LIMIT, *rounds[words].limit)
            nothing = NOT_REACHED, "not tried: no run came to its end", []
            played[words] = nothing if hangs else rounds[words].play(*arguments)
    finally:
        lesson.new_limit(LIMIT, *WIDE)
    cures = [rounds[words].cure * (played[words][0] != HOLDS) for words in rounds]
    columns = {n: [played[words][i] for words in rounds] for i, n in enumerate(COLUMNS)}
    board = pd.DataFrame(columns | {"cure": cures}, index=list(rounds))
    board.attrs["statuses"] = {  # of all requests, for the chart
        words: [status for run in played[words][2] for status in run.log["status"].tolist()]
        for words in rounds
    }
    return board


def chart(boards: dict[str, pd.DataFrame]) -> None:
    """Draw how many requests each flow sent in each round, a panel for each board."""
    from matplotlib import pyplot as plt

    import charts

    figure, panels = plt.subplots(1, len(boards), sharey=True, sharex=True, figsize=(8, 4))
    for axes, (name, board) in zip(panels, boards.items(), strict=True):
        statuses = board.attrs["statuses"].values()
        good = [numbers.count(200) for numbers in statuses]
        others = [len(numbers) - count for numbers, count in zip(statuses, good, strict=True)]
        axes.barh(board.index, good, color=charts.BLUE, label="status 200")
        axes.barh(board.index, others, left=good, color=charts.ORANGE, label="other")
        axes.set_title(f"{name}\n{sum(good) + sum(others)} requests", loc="left", fontsize="small")
    axes.invert_yaxis()  # of all panels
    figure.supxlabel("requests", fontsize="medium")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    title = "What each flow asked of the API"
    figure.suptitle(title, x=0.01, ha="left")
    charts.show(figure, f"{title}: bars of the requests in each round, with status 200 and others.")
