"""Fetch the star counts of GitHub repositories, by default the lessons' three, each once a day.

environment:
    GITHUB_TOKEN                  5,000 requests an hour instead of 60; sent to the API only
    GITHUB_API_URL                another API: GitHub Enterprise, or notebooks/fake_github.py
    PREFECT_API_URL               the Prefect server to use; without it a temporary one is started
    PREFECT_TASKS_REFRESH_CACHE   true: ask again for what is cached

exit code: 0 all fetched, 1 some failed, 2 bad arguments, 3 no Prefect server, 130/143 interrupted
"""

# The story comes first: two plain tasks, the same two made resilient, and the flow. The rest, below
# it, hardens it: the client, what GitHub's answers mean, waiting and the limit, the script.

import copyreg
import logging
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict, deque
from contextlib import suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import cache, partial
from json import JSONDecodeError
from pathlib import Path
from threading import Event, Lock, Timer

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

REPOS = ["PrefectHQ/prefect", "pydantic/pydantic", "huggingface/transformers"]
MAX_WORKERS = 16  # threads of the flow, and connections to the API
LONGEST_WAIT = 120  # seconds; if GitHub asks to wait for longer, a request fails instead


# --- The two tasks, as the first lesson meets them ------------------------------------------------


@task
def fetch_stats(github_repo: str) -> dict:
    """Ask the GitHub API for one repository, named `owner/name`.

    Returns the API's JSON object. Raises `httpx.HTTPStatusError` unless the answer's status is 2xx,
    `httpx.TransportError` where there was no whole answer, another `httpx.RequestError` where it
    cannot be decoded or only redirects, and `ValueError` where it is not JSON.
    """
    response = client().get(f"/repos/{github_repo}")
    response.raise_for_status()
    return response.json()


@task
def get_stars(repo_stats: dict) -> int:
    """Read the star count from what `fetch_stats` returned."""
    return repo_stats["stargazers_count"]


# --- The same two tasks, made resilient -----------------------------------------------------------


def fetch_within_limit(github_repo: str) -> dict:
    """`fetch_stats`, as soon as GitHub and the global limit let the request through.

    Raises `ValueError` for a useless answer: what a task returns is cached for a day.
    """
    gate = gates.setdefault(flow_run.id or task_run.id, Gate())
    gate.wait(github_repo)  # in there is rate_limit("github-api")
    try:
        stats = fetch_stats.fn(github_repo)
    except httpx.HTTPStatusError as error:
        gate.obey(github_repo, error)
        raise
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON; does a proxy or a log-in page answer? ({error})") from None
    match stats:
        case {"full_name": str(), "stargazers_count": int()}:
            return stats
    raise ValueError(f"the answer is no repository with a star count: {stats!r:.50}")


def can_heal(task, task_run, state) -> bool:
    """Retry what another attempt may heal: no answer, a server error, a rate limit; no 404."""
    error = state.data
    if isinstance(error, httpx.HTTPStatusError):
        wait = seconds_to_wait(error.response)
        return wait is not None and wait <= LONGEST_WAIT
    # JSONDecodeError: of a cached result that another process is just writing.
    passing = httpx.TransportError, ConcurrencySlotAcquisitionError, JSONDecodeError
    return isinstance(error, passing)


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
    # Caching: a day, as JSON files, by repository, task and API. A failure is never served. No
    # decoder: with Prefect's own, an answer could name a Python class to be made when it is read.
    cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api),
    cache_expiration=timedelta(days=1),
    result_serializer=JSONSerializer(object_decoder=None),
)
named_get_stars = get_stars.with_options(task_run_name="get_stars {repo_stats[full_name]}")


class IncompleteError(RuntimeError):
    """Some repositories failed: `failures` has their exceptions, `stars` what the others have."""

    def __init__(self, stars: dict[str, int], failures: dict[str, Exception]):
        self.stars, self.failures = stars, failures
        repos_by_reason = defaultdict(list)
        for repo, error in failures.items():
            repos_by_reason[reason(error)].append(repo)
        lines = [f"{len(failures)} of {len(stars) + len(failures)} repositories failed"]
        lines += [f"{', '.join(repos)}: {why}" for why, repos in repos_by_reason.items()]
        super().__init__("\n".join(lines))

    def __reduce__(self):  # a flow may run in another process
        return IncompleteError, (self.stars, self.failures)


# Mapping: one task run per repository, as many at a time as there are workers.
@flow(task_runner=ThreadPoolTaskRunner(MAX_WORKERS), persist_result=False, result_serializer="json")
def show_stars(github_repos: list[str]) -> dict[str, int]:
    """Print `{repo}: {count} stars` for each repository, in the order asked.

    Returns `{repo: count}`. Raises `ValueError` for names that are no `owner/name`, before any
    request, and `IncompleteError` if some repositories failed, after all the others are done.
    """
    check_names(github_repos)
    client()  # a malformed address or token is an error of the flow, not of every task run
    if not (limit := ensure_limit()).active:
        get_run_logger().warning(f"the limit {limit.name} is not active: it holds nothing back")

    names = {repo.lower(): repo for repo in github_repos}  # GitHub knows no capitals
    with Gate():  # after it nobody waits any longer, also if the run is interrupted
        futures = resilient_fetch_stats.map(list(names.values()))
        answers = dict(zip(names, futures.result(raise_on_failure=False), strict=True))
    fetched = {name: answer for name, answer in answers.items() if isinstance(answer, dict)}
    counts = named_get_stars.map(list(fetched.values())).result()
    count_of = dict(zip(fetched, counts, strict=True))

    stars = {repo: count_of[repo.lower()] for repo in github_repos if repo.lower() in count_of}
    for repo, count in stars.items():
        print(f"{repo}: {count} stars")
    if failures := {repo: answers[repo.lower()] for repo in github_repos if repo not in stars}:
        raise IncompleteError(stars, failures)
    return stars


# --- The client, and what GitHub's answers mean ---------------------------------------------------


def check_names(github_repos: list[str]) -> None:
    """Raises one `ValueError` for all that are not `owner/name`, in letters that GitHub allows."""
    if not github_repos:
        raise ValueError("no repository (Prefect uses up a generator before the flow: give a list)")
    name = re.compile(r"[A-Za-z0-9_-]+/(?!\.\.?$)[A-Za-z0-9._-]+")
    if bad := [repo for repo in github_repos if not name.fullmatch(repo)]:
        raise ValueError(f"not a repository, as owner/name: {', '.join(map(ascii, bad))}")


def api_url() -> str:
    """The API's address: `GITHUB_API_URL`, or GitHub itself."""
    return (os.environ.get("GITHUB_API_URL") or "https://api.github.com").rstrip("/")


def token() -> str:
    """The reader's `GITHUB_TOKEN`, or an empty string."""
    return os.environ.get("GITHUB_TOKEN", "").strip()


def client() -> httpx.Client:
    """The one HTTP client of all threads. Raises `ValueError` for a wrong address or token."""
    host = r"([\w.-]+|\[[\da-fA-F:.]+\])"  # or an IPv6 address
    if not re.fullmatch(rf"https?://{host}(:\d{{1,5}})?(/[\w./-]*)?", api_url()):
        shown = re.sub(".*@", "…@", api_url())  # without a password
        raise ValueError(f"GITHUB_API_URL is not an http(s) address: {shown!r}")
    if not re.fullmatch(r"[!-~]*", token()):  # httpx would quote it in an error
        raise ValueError("GITHUB_TOKEN is not a token: it has blanks or other odd characters in it")
    return client_for(api_url(), token())


@cache
def client_for(base_url: str, token: str) -> httpx.Client:
    headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
    if token:  # httpx takes it off again when a redirect leads to another host
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=httpx.Timeout(10, connect=5, pool=None),  # seconds
        limits=httpx.Limits(max_connections=MAX_WORKERS),
        follow_redirects=True,  # a renamed repository answers 301
    )


# Dask's workers pickle an `HTTPStatusError`. Of a request no headers go along: there is the token.
copyreg.pickle(httpx.Request, lambda request: (httpx.Request, (request.method, request.url)))
copyreg.pickle(
    httpx.HTTPStatusError,
    lambda e: (partial(type(e), str(e), request=e.request, response=e.response), ()),
)


def is_rate_limit(response: httpx.Response) -> bool:
    """Whether the answer refuses because of a rate limit, GitHub's primary or a secondary one."""
    if response.status_code != 403:
        return response.status_code == 429
    spent = response.headers.get("x-ratelimit-remaining") == "0"
    return spent or "retry-after" in response.headers or "rate limit" in response.text.lower()


def seconds_to_wait(response: httpx.Response) -> float | None:
    """How long to wait before the next attempt, as GitHub asks; None if there should be none.

    A rate limit that does not say lasts a minute; for a server error that does not, it is 0.
    """
    limited, headers = is_rate_limit(response), response.headers
    if not limited and response.status_code < 500:
        return None
    if (after := headers.get("retry-after", "")).isdecimal():
        return float(after)
    reset = headers.get("x-ratelimit-reset", "")
    if limited and headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal():
        return max(0.0, float(reset) - answered_at(response))
    return 60.0 if limited else 0.0


def answered_at(response: httpx.Response) -> float:
    """When it was answered (seconds since 1970): by GitHub's clock, since this one may be wrong."""
    with suppress(KeyError, ValueError, OverflowError):
        return parsedate_to_datetime(response.headers["date"]).timestamp()
    return time.time()


def clock(start: float, seconds: float) -> str:
    """The local time so many seconds after the start (seconds since 1970), rounded."""
    moment = start + min(seconds, 366 * 86_400) + 0.5
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def reason(error: Exception) -> str:
    """One line that says why a repository failed, and what to do where that is known."""
    match error:
        case httpx.TransportError():
            why = f"{api_url()} could not be reached ({str(error) or type(error).__name__})"
            return why + ": no network, or a proxy? To practise offline: notebooks/fake_github.py"
        case httpx.HTTPStatusError(response=response):
            host = f"{response.url.scheme}://{response.url.netloc.decode()}"
            why = f"{response.status_code} {response.reason_phrase} from {host}"
            if response.status_code == 401:
                why += ": GITHUB_TOKEN is wrong or has expired; renew it, or unset it"
            if (wait := seconds_to_wait(response) or 0) > LONGEST_WAIT:
                limited = is_rate_limit(response)
                until = clock(answered_at(response), wait)
                why += f": {'rate limited' if limited else 'do not ask again'} until {until}"
                if limited and not token():
                    why += "; with a GITHUB_TOKEN it answers 5,000 requests an hour"
            return why
        case NotSentError():
            return str(error)
        case _:
            return " ".join(f"{type(error).__name__}: {error}".split())


# --- Waiting, and the limit -----------------------------------------------------------------------


def ensure_limit():
    """The global concurrency limit for GitHub's allowance, as it is now; created if it is missing.

    Its slots, and those that become free meanwhile, are never more than what GitHub answers: 60 an
    hour, or with a token, counted apart, 5,000 an hour and 900 a minute.
    """
    name, slots, per_hour = ("github-api-token", 800, 4200) if token() else ("github-api", 50, 10)
    with get_client(sync_client=True) as prefect:
        with suppress(ObjectNotFound):
            return prefect.read_global_concurrency_limit_by_name(name)
        with suppress(ObjectAlreadyExists):  # another process was faster
            prefect.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(
                    name=name, limit=slots, slot_decay_per_second=per_hour / 3600
                )
            )
        return prefect.read_global_concurrency_limit_by_name(name)


class NotSentError(RuntimeError):
    """A request was not sent: the wait for it would be too long, or was ended."""


gates = {}  # by flow run; by task run where there is no flow


class Gate:
    """What each request of a run passes: not before GitHub's time is over, and with a slot.

    A flow run has one in each process. Once it is shut, whoever waits in it gives up.
    """

    def __init__(self):
        self.shut, self.why = Event(), "not asked: the flow run was interrupted"
        self.closed = defaultdict(lambda: (0.0, ""))  # until when (monotonic), why; None: for all
        self.turn = Lock()  # of the worker that acquires slots, for all that wait
        self.waiting = deque()  # an entry for each worker that wants a slot
        self.slots = 0  # acquired for workers that wait, and not yet taken by them
        self.told = -60.0  # when it was last said that somebody waits (monotonic seconds)

    def __enter__(self) -> None:
        gates[flow_run.id] = self  # a new one, also when the flow run is retried

    def __exit__(self, *_) -> None:
        self.shut.set()

    def sleep(self, seconds: float) -> None:
        """Sleep. Raises `NotSentError` as soon as the gate is shut, or closed for too long."""
        if self.shut.wait(seconds):
            raise NotSentError(self.why)
        self.closed_for(None)

    def closed_for(self, repo: str | None) -> float:
        """The seconds left of the time that GitHub named. Raises `NotSentError` if too many."""
        until, why = max(self.closed[None], self.closed[repo])
        if (left := until - time.monotonic()) > LONGEST_WAIT:
            raise NotSentError(why)
        return left

    def wait(self, repo: str) -> None:
        """Wait until a request for the repository may be sent. Raises `NotSentError`."""
        while True:
            self.sleep(self.closed_for(repo))
            self.take_slot()
            if self.closed_for(repo) <= 0:
                return  # else the slot is lost: it was for this moment

    def obey(self, repo: str, error: httpx.HTTPStatusError) -> None:
        """Let nobody ask before GitHub's time is over; a server error is for one repository."""
        wait = seconds_to_wait(error.response) or 0
        key = None if is_rate_limit(error.response) else repo
        told = time.monotonic() + wait, reason(error)
        if wait and told[0] > self.closed[key][0] + 1:  # else it has been said
            until = clock(answered_at(error.response), wait)
            get_run_logger().info("GitHub asks to wait %.0f s, until %s", wait, until)
        self.closed[key] = max(self.closed[key], told)

    def take_slot(self) -> None:
        """Wait for a slot of the global limit, and use it up."""
        self.waiting.append(None)
        try:
            with self.turn:
                self.sleep(0)  # if it was shut meanwhile, nobody tries once more
                self.slots = (self.slots or self.acquire()) - 1
        except httpx.TransportError as error:
            server = settings.PREFECT_API_URL.value() or "temporary"
            self.why = f"Prefect's server ({server}) is gone: {error}"
            self.shut.set()  # its client has tried for a minute, nobody else has to
            raise NotSentError(self.why) from error
        finally:
            self.waiting.pop()

    def acquire(self) -> int:
        """Acquire slots for those that wait now, as soon as there are any. Returns how many.

        It looks before it asks: after a refusal Prefect's client sleeps for a random time, in the
        mean as long as so many slots need to become free, and nothing wakes it.
        """
        seen, since = None, time.monotonic()
        while True:
            limit = ensure_limit()
            if (limit.updated, limit.active_slots) != seen:  # some were taken, or became free
                seen, since = (limit.updated, limit.active_slots), time.monotonic()
            slot = 1 / (limit.slot_decay_per_second or 1)  # seconds; without decay it will refuse
            free = limit.limit - limit.active_slots if limit.active else MAX_WORKERS
            # Servers before 3.7 leave decay out; if nothing changed for so long, one is free.
            if free > 0 or time.monotonic() - since > slot:
                count = min(max(free, 1), len(self.waiting))
                with suppress(TimeoutError):  # another process was faster
                    rate_limit(limit.name, occupy=count, timeout_seconds=3, strict=True)
                    return count
            wait = (len(self.waiting) - free) * slot
            if wait > 3 and time.monotonic() - self.told >= 60:
                self.told = time.monotonic()
                who = f"{len(self.waiting)} wait for slots of the limit {limit.name}"
                until = clock(time.time(), wait)
                get_run_logger().warning(f"{who}, the last of them until about {until}")
            self.sleep(min(max(slot / 20, 0.05), 1))


# --- The script -----------------------------------------------------------------------------------


def calm_server(home: Path) -> dict[str, str]:
    """Settings for a Prefect server on SQLite: one connection, few writes, no feed of events.

    By default a write that meets another one costs two seconds, or up to a minute.
    """
    # Prefect opens one connection for any address with ":memory:" in it. SQLite ignores `label`.
    database = f"{(home / 'prefect.db').as_uri()}?uri=true&label=:memory:"
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # offline, it would log an error
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    }


def main(argv: list[str] | None = None) -> int:
    """Run `show_stars` from the command line. Returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("repos", nargs="*", metavar="OWNER/NAME", default=REPOS)
    repos = parser.parse_args(argv).repos
    try:
        check_names(repos)
        client()
    except ValueError as error:
        parser.error(str(error))
    for handler in logging.getLogger().handlers:
        # No traceback of an error: the line of the state that it leads to says enough.
        handler.addFilter(lambda record: record.levelno < logging.ERROR or not record.exc_info)
    if not (server := settings.PREFECT_API_URL.value()):
        print("Starting a temporary Prefect server, which takes a moment", file=sys.stderr)
        os.environ |= calm_server(settings.PREFECT_HOME.value().absolute()) | os.environ
        for name in ("NO_PROXY", "no_proxy"):  # it is on this machine
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    defaults = {
        settings.PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,  # 20 are too few
        settings.PREFECT_CLIENT_RETRY_EXTRA_CODES: {500},  # as it does for 503
        settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its thread takes a second to end
    }
    code, last = 0, ""
    try:
        with settings.temporary_settings(set_defaults=defaults):
            show_stars(repos)
    except IncompleteError as error:
        code, last = 1, f"{error}\n"
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        code, last = 3, f"The Prefect server ({server or 'temporary'}) failed: {error}\n"
    finally:  # flushed, since `end` may leave no time for it
        for text, file in ("", sys.stdout), (last, sys.stderr):
            with suppress(OSError):  # a full disk, or nobody reads it
                print(text, end="", file=file, flush=True)
    return code


def end(code: int, seconds: float) -> None:
    """End the process by then: if its server is gone, Prefect would wait for hours."""
    timer = Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.exit(code)


def interrupt(number: int, _) -> None:
    """What Ctrl-C and SIGTERM do."""
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, b"Interrupted. What was fetched is cached.\n")
    end(128 + number, 5)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    code = main()
    end(code, 2 if code == 3 else 30)
