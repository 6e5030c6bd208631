"""Fetch the star counts of GitHub repositories, by default the lessons' three.

environment:
    GITHUB_TOKEN                  5,000 requests an hour instead of 60; sent to the API only
    GITHUB_API_URL                another API: GitHub Enterprise, or notebooks/fake_github.py
    PREFECT_API_URL               the Prefect server to use; without it a temporary one is started
    PREFECT_TASKS_REFRESH_CACHE   true: ask again for what is cached (it is kept for 20 hours)

exit code: 0 all fetched, 1 some failed, 2 bad arguments, 3 no Prefect server, 130/143/129 signals
"""

# First the story. Then three rooms, each for itself: GitHub's answers, waiting, the script.

import asyncio
import copyreg
import io
import logging
import math
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import cache, partial
from json import JSONDecodeError
from threading import Event, Lock, Timer
from typing import ClassVar
from urllib.request import getproxies_environment

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import httpx
from prefect import flow, get_run_logger, settings, task
from prefect.cache_policies import INPUTS, CacheKeyFnPolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import rate_limit
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run, task_run
from prefect.serializers import JSONSerializer
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from prefect.utilities.timeout import timeout as deadline

REPOS = ["PrefectHQ/prefect", "pydantic/pydantic", "huggingface/transformers"]
MAX_WORKERS = 16  # threads of the flow, and connections to the API
LONGEST_WAIT = 120  # seconds; if GitHub asks to wait for longer, a request fails instead


# --- The two tasks, as the first lesson meets them ------------------------------------------------
@task
def fetch_stats(github_repo: str) -> dict:
    """Ask the GitHub API for `owner/name`. Raises `httpx.HTTPError`, or `ValueError` if no JSON."""
    response = client().get(f"/repos/{github_repo}")
    response.raise_for_status()
    return response.json()


@task
def get_stars(repo_stats: dict) -> int:
    """Read the star count from what `fetch_stats` returned."""
    return repo_stats["stargazers_count"]


# --- The same two tasks, made resilient -----------------------------------------------------------
def fetch_within_limit(github_repo: str) -> dict:
    """`fetch_stats`, once there is a slot for it and no wait is left that GitHub asked for."""
    gate = Gate.of_run.setdefault(flow_run.id or task_run.id, Gate())
    gate.wait(github_repo, take_slots)
    try:
        with deadline(seconds=30):  # httpx's own time-out starts again with each byte
            return checked(fetch_stats.fn(github_repo))
    except httpx.HTTPStatusError as error:
        gate.obey(error)
        raise


def take_slots(gate: "Gate") -> int:
    """Wait for slots; take one for each waiting task, or as many as are free. Returns how many."""
    # Look before asking: refused, Prefect's client sleeps, and only its time-out can wake it.
    for _ in range(20):  # in a slot's time or a minute; then ask: old servers show none grown back
        limit = ensure_limit()
        free = limit.limit - limit.active_slots if limit.active else MAX_WORKERS
        if free > 0:
            break
        slot = 1 / (limit.slot_decay_per_second or 1)  # seconds until one more is free
        why = f"{len(gate.waiting)} wait for slots of {limit.name}, one each {slot:.3g} s"
        gate.pause(min(slot / 20, 3), why)
    count = min(max(free, 1), len(gate.waiting))
    with suppress(TimeoutError):  # another process was faster
        rate_limit(limit.name, occupy=count, strict=True, timeout_seconds=3)
        return count
    return 0


def can_heal(task, task_run, state) -> bool:
    """Retry what another attempt may heal: no answer, a server error, a rate limit; no 404."""
    error = state.data
    if isinstance(error, httpx.HTTPStatusError):
        wait = seconds_to_wait(error.response)
        return wait is not None and wait <= LONGEST_WAIT
    passing = httpx.TransportError, httpx.DecodingError, TimeoutError, JSONDecodeError
    return isinstance(error, (*passing, UnicodeDecodeError, ConcurrencySlotAcquisitionError))


def task_and_api(context, parameters) -> str:
    """Keep apart what `INPUTS` alone mixes up: two tasks with one argument, and two APIs."""
    return f"{context.task.name} {api_url()}"


resilient_fetch_stats = task(
    fetch_within_limit,
    name="fetch_stats",
    task_run_name="fetch_stats {github_repo}",
    # Retries: after about 1, 2 and 4 seconds, never all at the same moment (jitter).
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=1),
    retry_jitter_factor=0.5,
    retry_condition_fn=can_heal,
    # Caching: as JSON files, by repository, task and API. A failure is never served.
    cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api),
    cache_expiration=timedelta(hours=20),  # not a day: a run each morning is to ask again
    result_serializer=JSONSerializer(object_decoder=None),  # so that no answer can name a class
)
named_get_stars = get_stars.with_options(task_run_name="get_stars {repo_stats[full_name]}")


# Mapping: one task run per repository, as many at a time as there are workers.
@flow(task_runner=ThreadPoolTaskRunner(MAX_WORKERS), persist_result=False, result_serializer="json")
def show_stars(github_repos: list[str]) -> dict[str, int]:
    """Print `{repo}: {count} stars` for each repository, in the order asked.

    Returns `{repo: count}`. Raises `ValueError` for a bad name, address or token, before any
    request, and `IncompleteError` if some repositories failed, after all the others are done.
    """
    check(github_repos)
    if not (limit := ensure_limit()).active:
        get_run_logger().warning(f"the limit {limit.name} is not active: it holds nothing back")
    repos = list(dict.fromkeys(github_repos))
    gate = Gate.of_run[flow_run.id] = Gate()  # a new one, also when the flow run is retried
    try:
        answers = resilient_fetch_stats.map(repos).result(raise_on_failure=False)
    finally:
        gate.over.set()  # nobody waits any longer, also if the run is interrupted
    stars, failures = {}, {}
    for repo, answer in zip(repos, answers, strict=True):
        if isinstance(answer, dict):
            stars[repo] = named_get_stars(answer)
            print(f"{repo}: {stars[repo]} stars")
        else:
            failures[repo] = answer
    if failures:
        raise IncompleteError(stars, failures)
    return stars


# --- GitHub's answers: the client, and what each answer means -------------------------------------
def check(github_repos: list[str]) -> None:
    """Raises `ValueError` for names that are not `owner/name`, for a wrong address or token."""
    name = re.compile(r"[\w-]+/(?!\.\.?$)[\w.-]+", re.ASCII)  # the letters that GitHub allows
    bad = [repo for repo in github_repos if not name.fullmatch(repo)]
    if bad or not github_repos:  # a generator arrives here used up
        raise ValueError(f"not a list of repositories, as owner/name: {bad!a}")
    client()


def api_url() -> str:
    """The API's address: `GITHUB_API_URL`, or GitHub itself."""
    return (os.environ.get("GITHUB_API_URL") or "https://api.github.com").rstrip("/")


def token() -> str:
    """The reader's `GITHUB_TOKEN`, or an empty string."""
    return os.environ.get("GITHUB_TOKEN", "").strip()


def client() -> httpx.Client:
    """The one HTTP client of all threads. Raises `ValueError` for a wrong address or token."""
    return client_for(api_url(), token())


@cache
def client_for(address: str, token: str) -> httpx.Client:
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/\S*)?", address, re.I):
        shown = address.rpartition("@")[2]  # without a password
        raise ValueError(f"GITHUB_API_URL is not an http(s) address: {shown!r}")
    if not (token.isascii() and token.isprintable()):  # httpx would quote it in an error
        raise ValueError("GITHUB_TOKEN is not a token: it has odd characters in it")
    headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
    if token:  # httpx takes it off again when a redirect leads to another host
        headers["Authorization"] = f"Bearer {token}"
    try:
        return httpx.Client(
            base_url=address,
            headers=headers,
            timeout=httpx.Timeout(10, connect=5, pool=None),  # seconds
            limits=httpx.Limits(max_connections=MAX_WORKERS),
            follow_redirects=True,  # a renamed repository answers 301
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        read = re.compile("(all|https?)_proxy|ssl_cert_.*|github_api_url", re.I)
        raise ValueError(f"{', '.join(filter(read.fullmatch, os.environ))}: {error}") from error


# Dask (lesson 7) pickles an `HTTPStatusError`: its request without headers, for there is the token.
copyreg.pickle(httpx.Request, lambda request: (httpx.Request, (request.method, request.url)))
copyreg.pickle(
    httpx.HTTPStatusError,
    lambda e: (partial(httpx.HTTPStatusError, str(e), request=e.request, response=e.response), ()),
)


def checked(stats: object) -> dict:
    """The answer, if it is about a repository; else a `ValueError`, which is never cached."""
    match stats:
        case {"full_name": str(), "stargazers_count": int()}:
            return stats | {"temp_clone_token": None}  # a private repository's is a secret
    raise ValueError(f"the answer is no repository with a star count: {stats!r:.50}")


def seconds_to_wait(response: httpx.Response) -> float | None:
    """How long to wait before the next attempt, as GitHub asks; None: do not try again."""
    status, headers, now = response.status_code, response.headers, time.time()
    spent = headers.get("x-ratelimit-remaining") == "0"
    limited = spent or "retry-after" in headers or re.search("(?i)rate limit|abuse", response.text)
    if not (status >= 500 or status == 429 or (status == 403 and limited)):
        return None
    after, reset = headers.get("retry-after", ""), headers.get("x-ratelimit-reset", "")
    with suppress(KeyError, ValueError, OverflowError):  # GitHub's clock: ours may be wrong
        now = parsedate_to_datetime(headers["date"]).timestamp()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(after).timestamp() - now)
    if status < 500 and spent and reset.isdecimal():
        return max(0.0, float(reset) - now)
    return 60.0 if status < 500 else 0.0  # it does not say


def reason(error: Exception) -> str:
    """One line that says why a repository failed. A bad answer is told in GitHub's own words."""
    match error:
        case httpx.TransportError():
            return f"{api_url()} could not be reached: {error!r}. Offline: notebooks/fake_github.py"
        case httpx.HTTPStatusError(response=response):
            words = response.reason_phrase
            with suppress(ValueError, TypeError, KeyError):
                words = " ".join(ascii(response.json()["message"]).strip("'\"").split())[:150]
            if wait := seconds_to_wait(response):
                words += f"; it asks to wait {wait:.0f} s"
            if response.status_code in (401, 403, 429):
                words += f"; {'a' if token() else 'no'} GITHUB_TOKEN is set"
            return f"{response.status_code} from {response.url.netloc.decode()}: {words}"
    return " ".join(f"{type(error).__name__}: {error}".split())


class IncompleteError(RuntimeError):
    """Some repositories failed: `failures` has their exceptions, `stars` what the others have."""

    def __init__(self, stars: dict[str, int], failures: dict[str, Exception]):
        self.stars, self.failures = stars, failures

    def __str__(self) -> str:
        lines = [f"{repo}: {reason(error)}" for repo, error in self.failures.items()]
        head = f"{len(lines)} of {len(lines) + len(self.stars)} repositories failed"
        return "\n".join([head, *lines])


# --- Waiting: the limit, and the gate -------------------------------------------------------------
def ensure_limit():
    """The global concurrency limit, as it is now. If it is missing, it is created."""
    name, slots, per_hour = ("github-api-token", 800, 4200) if token() else ("github-api", 50, 10)
    size = {"limit": slots, "slot_decay_per_second": per_hour / 3600}  # in sum 60 or 5,000
    with get_client(sync_client=True) as prefect:
        with suppress(ObjectNotFound):
            return prefect.read_global_concurrency_limit_by_name(name)
        with suppress(ObjectAlreadyExists):  # another process was faster
            prefect.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, **size))
        return prefect.read_global_concurrency_limit_by_name(name)


class NotSentError(RuntimeError):
    """A request was not sent: the wait for it would be too long, or was ended."""


class Gate:
    """Where the tasks of a flow run wait until their requests may be sent: one in each process."""

    of_run: ClassVar[dict] = {}  # by flow run; by task run where there is no flow

    def __init__(self):
        self.over = Event()  # the flow run
        self.refusals = [(0.0, "")]  # until when it is closed (monotonic seconds), and why
        self.turn = Lock()  # of the task that takes slots, for all that wait
        self.waiting = []  # their repositories
        self.slots = 0  # taken for those that wait, and not yet used
        self.told = -60.0  # the last line about slots (monotonic seconds)

    def closed_for(self) -> float:
        return max(0.0, max(self.refusals)[0] - time.monotonic())  # seconds

    def pause(self, seconds: float, why: str = "") -> None:
        """Sleep; log why, at most once a minute. Raises `NotSentError` if it is no use to wait."""
        if self.closed_for() > LONGEST_WAIT:
            raise NotSentError(max(self.refusals)[1])
        if why and time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            get_run_logger().warning(why)
        if self.over.wait(seconds):
            raise NotSentError("not asked: the flow run was interrupted")

    def wait(self, repo: str, take_slots) -> None:
        """Wait until it is open and there is a slot. Raises `NotSentError`."""
        self.waiting.append(repo)
        with self.turn:
            try:
                self.pause(0)  # if the run ended meanwhile, nobody goes on
                while not self.slots or self.closed_for() > 0:
                    self.pause(self.closed_for())
                    self.slots = take_slots(self)  # those from before the pause are lost
                self.slots -= 1
            except httpx.HTTPError as error:  # Prefect's client has tried for a minute: enough
                self.refusals.append((math.inf, f"Prefect's server failed: {error}"))
                raise NotSentError(max(self.refusals)[1]) from error
            finally:
                self.waiting.remove(repo)

    def obey(self, error: httpx.HTTPStatusError) -> None:
        """Do as GitHub asks: a rate limit closes the gate, a server error delays this task."""
        wait, why = seconds_to_wait(error.response) or 0, reason(error)
        if wait > self.closed_for() + 1:  # else it has been said
            get_run_logger().warning(why)
        if error.response.status_code >= 500:
            self.over.wait(wait if wait <= LONGEST_WAIT else 0)
        elif wait:
            self.refusals.append((time.monotonic() + wait, why))


# --- The script -----------------------------------------------------------------------------------
DEFAULTS = {
    settings.PREFECT_CLIENT_RETRY_EXTRA_CODES: {500},  # retried, as 503 is
    settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its thread takes a second to end
    settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
    settings.PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,  # 20 are too few
    settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,  # offline, it would log an error
    settings.PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED: False,  # two writes at once stall
    settings.PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE: 200,
}


def one_line(record: logging.LogRecord) -> bool:
    """A log filter: no tracebacks, and no line that a run's final state repeats."""
    message, error = record.getMessage(), record.exc_info
    if error:
        record.msg, record.args = f"{message}: {error[1]!r}", ()
        record.exc_info = record.exc_text = None
    return not (error and message.startswith(("Encountered exception", "Task run failed")))


def main(argv: list[str] | None = None) -> int:
    """Run `show_stars` from the command line. Returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("repos", nargs="*", metavar="OWNER/NAME", default=REPOS)
    repos = parser.parse_args(argv).repos
    if proxies := getproxies_environment():  # none is asked for what is on this machine
        os.environ["no_proxy"] = f"{proxies.get('no', '')},127.0.0.1,localhost"
    try:
        check(repos)
    except ValueError as error:
        parser.error(str(error))
    server, out, code, err = settings.PREFECT_API_URL.value(), io.StringIO(), 0, ""
    try:
        with settings.temporary_settings(set_defaults=DEFAULTS), redirect_stdout(out):
            if not server:
                print("Starting a temporary Prefect server, which takes a moment", file=sys.stderr)
                from prefect.server.database import provide_database_interface as database

                asyncio.run(database().create_db())  # what is wrong with it shows here, at once
            show_stars.with_options(log_prints=False)(repos)
    except IncompleteError as error:
        code, err = 1, f"{error}\n"
    except (LookupError, TypeError, AttributeError, NameError):
        raise  # a mistake in this file
    except Exception as error:
        code, err = 3, f"The Prefect server ({server or 'temporary'}) failed: {error!r}\n"
    for text, file in (out.getvalue(), sys.stdout), (err, sys.stderr):  # below the logs
        with suppress(OSError):  # a full disk, or nobody reads it
            print(text, end="", file=file, flush=True)
    return code


def end(code: int) -> None:
    """End the process within ten seconds: without its server, Prefect would wait for hours."""
    timer = Timer(10, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.stdout = None  # what could not be written there is not tried once more
    sys.exit(code)


def interrupt(number: int, _) -> None:
    """What Ctrl-C, SIGTERM and SIGHUP do."""
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, b"Interrupted. What was fetched is cached.\n")
    end(128 + number)


if __name__ == "__main__":
    for handler in logging.getLogger().handlers:
        handler.addFilter(one_line)
    for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    end(main())
