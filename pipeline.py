"""Fetch the star counts of GitHub repositories, and survive the real world.

`fetch_stats` and `get_stars` are plain Prefect tasks: a request and a look-up. `show_stars` is the
finished flow, in which Prefect's own features make the same two tasks resilient: retries, mapping,
a global rate limit and a cache. The lessons in `notebooks/` add them one at a time.

    python pipeline.py                        the three repositories of the lessons
    python pipeline.py django/django          any others
    python pipeline.py --help                 the environment variables, the exit codes

Facts about the API: https://docs.github.com/rest/using-the-rest-api/best-practices-for-using-the-rest-api
"""

import argparse
import logging
import os
import re
import signal
import sys
import time
from collections import UserDict, defaultdict, deque
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Lock, Timer
from typing import NoReturn

import httpx
from prefect import flow, get_run_logger, task
from prefect.cache_policies import INPUTS, CacheKeyFnPolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import rate_limit
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.futures import PrefectFutureList, as_completed
from prefect.runtime import flow_run
from prefect.serializers import JSONSerializer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from rich.console import Console
from rich.progress import track
from rich.theme import Theme

REPOS = ["PrefectHQ/prefect", "pydantic/pydantic", "huggingface/transformers"]
MAX_WORKERS = 16  # threads of the flow, and connections to the API
LONGEST_WAIT = 120  # seconds; a request to come back later than this fails instead
LARGEST_ANSWER = 1_000_000  # bytes; a repository takes some 6,000
MANY = 100  # repositories, from which on a progress bar shows the way
LIMIT = "github-api"
HOUR = 3600
REQUESTS_PER_HOUR = {False: 60, True: 5000}  # GitHub's allowance, without and with a token


# --- The two tasks, as the first lesson meets them ------------------------------------------------


@task
def fetch_stats(github_repo: str) -> dict:
    """Ask the GitHub API for one repository, named `owner/name`.

    Returns the API's JSON object. Raises `httpx.HTTPStatusError` for an answer of 400 or above,
    `httpx.TransportError` where there was no answer, and `ValueError` where it is not JSON.
    """
    response = github().get(f"/repos/{github_repo}")
    response.raise_for_status()
    return response.json()


@task
def get_stars(repo_stats: dict) -> int:
    """Read the star count from what `fetch_stats` returned."""
    return repo_stats["stargazers_count"]


# --- The same two tasks, made resilient -----------------------------------------------------------


def fetch_within_limit(github_repo: str) -> dict:
    """`fetch_stats`, as soon as the global limit grants a slot for the request.

    Raises `ValueError` if the answer has no usable star count. It must fail here: what a task
    returns is cached for a day, also when it is useless.
    """
    slots[flow_run.id].take()
    stats = fetch_stats.fn(github_repo)
    stars = stats.get("stargazers_count") if isinstance(stats, dict) else None
    if type(stars) is not int or stars < 0:
        raise ValueError(f"the answer has no usable stargazers_count: {stars!r:.50}")
    return stats


def can_heal(task, task_run, state) -> bool:
    """Retry only what another attempt may heal, and not before GitHub's own time is up.

    That is a lost connection, a timeout, a server error (5xx) or a rate limit. A repository that
    does not exist (404) will not exist a second later. Prefect adds its backoff to the wait.
    """
    error = state.data
    if isinstance(error, httpx.HTTPStatusError):
        wait = seconds_to_wait(error.response)
        if wait is None or wait > LONGEST_WAIT:
            return False
        if wait:
            get_run_logger().info("GitHub asks to wait %.0f s before the next request", wait)
            pause(wait)
        return True
    return isinstance(
        error, (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
    )


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
    # Caching: a day, as JSON files, by repository, task and API. Failures are never cached. No
    # decoder: with Prefect's own, an answer could name a Python class to be made when it is read.
    cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api),
    cache_expiration=timedelta(days=1),
    result_serializer=JSONSerializer(object_decoder=None),
)


class IncompleteError(RuntimeError):
    """Some repositories failed. Nothing else is lost:

    `stars` has the counts of the others (`{repo: count}`), which are cached, so that the next run
    fetches only what is missing. `failures` has the exception of each that failed.
    """

    def __init__(self, stars: dict[str, int], failures: dict[str, Exception]):
        self.stars = stars
        self.failures = failures
        repos_by_reason = defaultdict(list)
        for repo, error in failures.items():
            repos_by_reason[reason(error)].append(repo)
        lines = [f"{', '.join(repos)}: {why}" for why, repos in repos_by_reason.items()]
        total = len(stars) + len(failures)
        super().__init__("\n".join([f"{len(failures)} of {total} repositories failed", *lines]))


# Mapping: one task run per repository, as many at a time as there are workers.
@flow(task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS), persist_result=False)
def show_stars(github_repos: list[str]) -> dict[str, int]:
    """Print `{repo}: {count} stars` for each repository, in the order asked.

    Returns `{repo: count}`. Raises `ValueError` for names that are no `owner/name`, before any
    request, and `IncompleteError` if some repositories failed, after all the others are done.
    """
    repos = list(dict.fromkeys(check_names(github_repos)))
    github()  # a malformed address or token is an error of the flow, not of every task run
    ensure_limit()

    futures = follow(resilient_fetch_stats.map(repos), "fetch_stats")
    states = {repo: future.state for repo, future in zip(repos, futures, strict=True)}
    fetched = {repo: state.result() for repo, state in states.items() if state.is_completed()}
    answers = [UserDict(stats) for stats in fetched.values()]  # no dict to search for futures
    counts = follow(get_stars.map(answers), "get_stars").result()
    stars = dict(zip(fetched, counts, strict=True))

    for repo, count in stars.items():
        print(f"{repo}: {count} stars")
    if len(stars) < len(repos):
        failed = [repo for repo in repos if repo not in stars]
        error = IncompleteError(
            stars, {repo: states[repo].result(raise_on_failure=False) for repo in failed}
        )
        return Failed(message=str(error), data=error)  # to the caller, the same as to raise it
    return stars


# --- Talking to GitHub ----------------------------------------------------------------------------


def github() -> httpx.Client:
    """The one HTTP client that all threads share, for the API of this moment's environment.

    Raises `ValueError` if `GITHUB_API_URL` is no http(s) address or `GITHUB_TOKEN` no token.
    """
    return _client(api_url(), token())


def api_url() -> str:
    """The API's address: `GITHUB_API_URL`, or GitHub itself."""
    return _checked(os.environ.get("GITHUB_API_URL") or "https://api.github.com")


@cache
def _checked(address: str) -> str:
    try:
        url = httpx.URL(address)
        usable = url.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", url.host)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise ValueError(f"GITHUB_API_URL is not an http(s) address: {address!r}")
    return address.rstrip("/")


def token() -> str:
    """The reader's `GITHUB_TOKEN`, or an empty string."""
    text = os.environ.get("GITHUB_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", text):  # httpx would quote it in an error
        raise ValueError("GITHUB_TOKEN is not a token: it has blanks or other odd characters in it")
    return text


@cache
def _client(base_url: str, token: str) -> httpx.Client:
    headers = {
        "Accept": "application/vnd.github+json",
        "X-GitHub-Api-Version": "2022-11-28",
        "User-Agent": "resilient-pipeline-walkthrough",
        "Accept-Encoding": "identity",  # compressed, `bound` would not see the real size
    }
    if token:  # httpx takes it off again when a redirect leads to another host
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(
        base_url=base_url,
        headers=headers,
        timeout=httpx.Timeout(10, connect=5, pool=None),  # seconds
        limits=httpx.Limits(max_connections=MAX_WORKERS),
        follow_redirects=True,  # a renamed repository answers 301
        event_hooks={"response": [bound]},
    )


def bound(response: httpx.Response) -> None:
    """Let no more than `LARGEST_ANSWER` bytes of an answer into memory; `ValueError` beyond."""
    if "content-encoding" in response.headers:
        raise ValueError("the answer is compressed, which was not asked for")
    stream = response.stream

    class Bounded(httpx.SyncByteStream):
        def __iter__(self):
            size = 0
            for chunk in stream:
                size += len(chunk)
                if size > LARGEST_ANSWER:
                    raise ValueError(f"the answer is longer than {LARGEST_ANSWER:,} bytes")
                yield chunk

        def close(self):
            stream.close()

    response.stream = Bounded()


def seconds_to_wait(response: httpx.Response) -> float | None:
    """How long GitHub asks to wait before the next attempt; None if there should be none.

    The order is GitHub's: `retry-after` (seconds or a date), then `x-ratelimit-reset` if nothing
    remains, then a minute for a rate limit that does not say. 0 for any other server error.
    """
    status, headers = response.status_code, response.headers
    limited = status == 429 or (
        status == 403
        and (
            "retry-after" in headers
            or headers.get("x-ratelimit-remaining") == "0"
            or "rate limit" in response.text.lower()
        )
    )
    if not limited and status < 500:
        return None
    retry_after = headers.get("retry-after", "")
    if retry_after.isdecimal():
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    if not limited:
        return 0.0
    reset = headers.get("x-ratelimit-reset", "")
    if headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal():
        return max(0.0, float(reset) - time.time())
    return 60.0


def reason(error: Exception) -> str:
    """One line that says why a repository failed, and what to do where that is known."""
    match error:
        case httpx.HTTPStatusError(response=response):
            why = f"{response.status_code} {response.reason_phrase} from {api_url()}"
            wait = seconds_to_wait(response)
            if wait and wait > LONGEST_WAIT:
                until = datetime.now() + timedelta(seconds=min(wait, 366 * 24 * HOUR))
                why += f": rate limited until {until:%Y-%m-%d %H:%M:%S}"
                if not token():
                    why += " (with a GITHUB_TOKEN the limit is 5,000 requests an hour)"
            return why
        case httpx.TransportError():
            return (
                f"{api_url()} could not be reached ({str(error) or type(error).__name__}); to "
                "practise offline: python notebooks/fake_github.py"
            )
        case _:
            return " ".join(f"{type(error).__name__}: {error}".split())


# --- Names ----------------------------------------------------------------------------------------

# Owners: letters, digits and single hyphens inside, 39 at most; underscores in managed accounts.
OWNER_AND_NAME = re.compile(r"(?=[^/]{1,39}/)[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*/[A-Za-z0-9._-]{1,100}")


def check_names(github_repos: Iterable[str]) -> list[str]:
    """Return the names as a list. Raises one `ValueError` for all that GitHub would not allow."""
    repos = list(github_repos)
    bad = [
        repo
        for repo in repos
        if not OWNER_AND_NAME.fullmatch(repo) or repo.endswith(("/.", "/..", ".git"))
    ]
    if bad:
        raise ValueError(f"not a repository, as owner/name: {', '.join(map(ascii, bad))}")
    return repos


# --- The limit, and waiting -----------------------------------------------------------------------


def ensure_limit() -> None:
    """Create the global concurrency limit if it is missing. One that exists is left as it is,
    but for our own limit of 60 an hour: with a token it grows to GitHub's 5,000.
    """
    per_hour = REQUESTS_PER_HOUR[bool(token())]
    size = {"limit": per_hour, "slot_decay_per_second": per_hour / HOUR}
    with get_client(sync_client=True) as client:
        try:
            existing = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another process was faster
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=LIMIT, **size)
                )
        else:
            if existing.limit == REQUESTS_PER_HOUR[False] < per_hour:
                client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(**size))


_given_up = {}  # the flow runs in which nobody should wait any longer, and why


class Slots:
    """A flow run's slots of the global limit, acquired by one worker for all that wait.

    Each would otherwise be a request of its own to Prefect's server, one after another. Of a limit
    with plenty of slots it acquires some ahead: as many as were used so far, at most a hundredth of
    what is free. What is not used within a second lapses.
    """

    def __init__(self):
        self.turn = Lock()  # of the worker that acquires
        self.waiting = deque()  # an entry for each worker that wants a slot
        self.acquired, self.lapse = 0, 0.0  # slots not yet used, and the time when they lapse
        self.free = 0  # slots seen at the server and not yet acquired
        self.used = 0

    def take(self) -> None:
        """Wait for a slot, and use it up.

        Raises `ConcurrencySlotAcquisitionError` if the limit is missing, and `InterruptedError` if
        the flow run was interrupted or Prefect's server is gone.
        """
        self.waiting.append(None)
        try:
            with self.turn:
                if not self.acquired or time.monotonic() > self.lapse:
                    try:
                        self.acquired, self.lapse = self.acquire(), time.monotonic() + 1
                    except httpx.HTTPError as error:
                        server_is_gone(error)
                    except ConcurrencySlotAcquisitionError as error:
                        if isinstance(error.__cause__, httpx.TransportError):
                            server_is_gone(error.__cause__)
                        raise
                self.acquired -= 1
                self.used += 1
        finally:
            self.waiting.pop()

    def acquire(self) -> int:
        """Acquire slots for those that wait, as soon as any is free. Returns how many."""
        pause(0.01)  # others are on their way
        if self.free < MAX_WORKERS:
            self.free = wait_for_free_slots()
        ahead = min(self.used, self.free // 100)
        count = min(max(len(self.waiting), ahead), self.free)
        self.free -= count
        rate_limit(LIMIT, occupy=count, strict=True)  # strict: a missing limit is an error
        return count


slots = defaultdict(Slots)  # by flow run


def wait_for_free_slots() -> int:
    """Look until the limit has free slots. Returns how many; for a missing limit, 1.

    To ask for a slot when none is free would cost one: each refusal sets the decay back.
    """
    try:
        with get_client(sync_client=True) as client:
            while True:
                limit = client.read_global_concurrency_limit_by_name(LIMIT)
                free = limit.limit - (limit.active_slots if limit.active else 0)
                if free > 0:
                    return free
                pause(0.5 / max(limit.slot_decay_per_second, 0.5))
    except ObjectNotFound:
        return 1


def server_is_gone(error: httpx.HTTPError) -> NoReturn:
    """Give the flow run up: Prefect's client has tried for a minute, no worker should try again.

    Raises `InterruptedError`.
    """
    give_up(f"Prefect's server ({PREFECT_API_URL.value()}) does not answer: {error}")
    raise InterruptedError(_given_up.get(flow_run.id, error)) from error


def pause(seconds: float) -> None:
    """Sleep, but raise `InterruptedError` as soon as the flow run is given up."""
    end = time.monotonic() + seconds
    while True:
        if why := _given_up.get(flow_run.id):
            raise InterruptedError(why)
        if (left := end - time.monotonic()) <= 0:
            return
        time.sleep(min(left, 0.2))


def give_up(why: str) -> None:
    """Let no worker of this flow run wait any longer."""
    if flow_run.id:
        _given_up[flow_run.id] = why


def follow(futures: PrefectFutureList, title: str) -> PrefectFutureList:
    """Wait for the futures, and return them. If there are many, a progress bar shows the way."""
    finished = as_completed(futures)
    console = Console(stderr=True)
    for handler in logging.getLogger().handlers:
        console = getattr(handler, "console", console)  # so that log and bar share the screen
    if len(futures) >= MANY and console.is_jupyter:
        from IPython.display import ProgressBar

        finished = zip(ProgressBar(len(futures)), finished, strict=False)
    elif len(futures) >= MANY and console.is_terminal:
        finished = track(finished, title, len(futures), console=console)
    try:
        with console.use_theme(Theme()):  # Prefect's own knows no colors for a bar
            for _ in finished:
                pass
        futures.wait()  # a future knows its final state only when it was asked
    except KeyboardInterrupt:
        give_up("interrupted")
        raise
    return futures


# --- The script -----------------------------------------------------------------------------------


# For the temporary server that Prefect starts where none is configured. On a fresh home it needs
# longer than the 20 seconds that Prefect grants it.
TEMPORARY_SERVER = {
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,
    PREFECT_SERVER_ANALYTICS_ENABLED: False,
}


INTERRUPTED = "Interrupted. What was fetched is cached."


def no_traceback(record: logging.LogRecord) -> bool:
    """Filter for the terminal, where one line says it; Prefect's server has the traceback too."""
    record.exc_info = record.exc_text = None
    return True


def main(argv: list[str] | None = None) -> int:
    """Run `show_stars` from the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Print the star counts of GitHub repositories; fetch each once a day at most.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
environment:
  GITHUB_TOKEN                  5,000 requests an hour instead of 60; sent to the API only
  GITHUB_API_URL                another API: GitHub Enterprise, or the practice API of
                                python notebooks/fake_github.py
  PREFECT_API_URL               the Prefect server to use; without it a temporary one is started
  PREFECT_TASKS_REFRESH_CACHE   true: ask again for what is cached

exit code: 0 all fetched, 1 some repositories failed, 2 bad arguments or address, 3 no Prefect
server, 130 interrupted
""",
    )
    parser.add_argument(
        "repos",
        nargs="*",
        metavar="OWNER/NAME",
        default=REPOS,
        help=f"the repositories; without any: {', '.join(REPOS)}",
    )
    repos = parser.parse_args(argv).repos
    try:
        check_names(repos)
        github()
    except ValueError as error:
        parser.error(str(error))
    for handler in logging.getLogger().handlers:
        handler.addFilter(no_traceback)
    try:
        with temporary_settings(set_defaults=TEMPORARY_SERVER):
            state = show_stars(repos, return_state=True)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    except (httpx.HTTPError, RuntimeError, ValueError) as error:  # the flow's own are in its state
        server = PREFECT_API_URL.value() or "a temporary one"
        print(f"The Prefect server ({server}) failed: {error}", file=sys.stderr)
        return 3
    if state.is_completed():
        return 0
    print(state.result(raise_on_failure=False), file=sys.stderr)
    return 1


def end_within(seconds: float, code: int, message: str = "") -> None:
    """End the process after so many seconds if it has not ended by itself.

    Prefect waits for its workers, and a worker waits for GitHub or for a slot, perhaps for minutes.
    It also waits until its server has the last logs and events: for hours if the server is gone.
    """

    def end():
        print(message, end="", file=sys.stderr, flush=True)
        os._exit(code)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()


def interrupt(*_) -> None:
    """What Ctrl-C does."""
    end_within(5, 130, INTERRUPTED + "\n")
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    code = main()
    end_within(2 if code == 3 else 30, code)
    sys.exit(code)
