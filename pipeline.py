"""Fetch the star counts of GitHub repositories, by default the lessons' three.

environment:
    GITHUB_TOKEN                  5,000 requests an hour instead of 60; sent to the API only
    GITHUB_API_URL                another API: GitHub Enterprise, or notebooks/fake_github.py
    PREFECT_API_URL               the Prefect server to use; without it a temporary one is started
    PREFECT_TASKS_REFRESH_CACHE   true: fetch again what is cached (it is kept for 20 hours)

exit code: 0 all fetched, 1 some failed, 2 bad arguments, 3 no Prefect server, 130/143/129 signals
"""

# First the story: the flow of lesson 6, its names in its order, plus what production adds.
# Then three sections, each for itself: GitHub's responses, waiting, the script.

import copyreg
import io
import logging
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from json import JSONDecodeError
from threading import Event, Lock, Timer
from urllib.request import getproxies_environment

# A process of its own, and no guest of a notebook (`%run`), a debugger or `python -i`.
if ALONE := __name__ == "__main__" and not (
    sys.flags.interactive or {"IPython", "pdb", "debugpy"} & sys.modules.keys()
):
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (or it all goes to stdout)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import httpx
from prefect import flow, get_run_logger, settings, task, unmapped
from prefect.cache_policies import INPUTS, CacheKeyFnPolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import rate_limit
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.serializers import JSONSerializer
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from prefect.utilities.asyncutils import run_coro_as_sync

REPOS = ["PrefectHQ/prefect", "pydantic/pydantic", "huggingface/transformers"]
MAX_WORKERS = 16  # threads of the flow, and connections to the API
LONGEST_WAIT = 120  # seconds; if GitHub asks to wait for longer, a request fails instead
LONGEST_READ = 30  # seconds for the body of a response


@task
def fetch_stats(github_repo: str) -> dict:
    """Request a repository from the GitHub API. Raises `httpx.HTTPError`, or `ValueError`."""
    response = client().get(f"/repos/{github_repo}")
    response.raise_for_status()
    return response.json()


@task
def get_stars(repo_stats: dict) -> int:
    """Read the star count from what `fetch_stats` returned."""
    return repo_stats["stargazers_count"]


def take_turn(github_repo: str, shared: "Shared") -> None:
    """Return when a request may be sent. Raises `RuntimeError` if that will not be in time."""
    shared.waiting.append(github_repo)
    with shared.turn:
        shared.waiting.remove(github_repo)
        while shared.over.is_set() or not shared.slots or time.monotonic() < shared.not_before:
            wait = max(0, shared.not_before - time.monotonic())
            if wait > LONGEST_WAIT or shared.over.wait(wait):
                raise RuntimeError(f"not sent: {shared.why}")
            shared.slots = 0  # slots from before the wait are void
            with suppress(TimeoutError):  # another process was faster
                if count := slots_to_take(shared):
                    rate_limit(shared.limit, occupy=count, strict=True, timeout_seconds=3)
                    shared.slots = count
        shared.slots -= 1


def obey(response: httpx.Response, shared: "Shared") -> None:
    """Back off as GitHub asks: after a refusal the whole run, after a server error this task."""
    wait, why = seconds_to_wait(response), str(BadResponseError(response))
    if is_refusal(response):
        until = time.monotonic() + wait
        with shared.refusing:
            if until > shared.not_before + 1:  # else it has been logged
                get_run_logger().warning(why)
            if until > shared.not_before:  # a shorter wait does not replace a longer one
                shared.not_before, shared.why = until, why
    if wait <= LONGEST_WAIT:
        shared.over.wait(wait)


def is_transient(task, task_run, state) -> bool:
    """Whether another attempt may succeed: after a lost connection, a server error, a refusal."""
    error = state.data
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        passing = response.is_server_error or response.status_code == 408 or is_refusal(response)
        return passing and seconds_to_wait(response) <= LONGEST_WAIT
    return isinstance(error, TRANSIENT)


def task_and_api(context, parameters) -> str:
    """Keep apart what `INPUTS` alone mixes up: two tasks with one argument, and two APIs."""
    return f"{context.task.name} {api_url()}"


@task(
    name="fetch_stats",
    task_run_name="fetch_stats {github_repo}",
    # Retries: after about 1, 2 and 4 seconds, never all at the same moment (jitter).
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=1),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    # Caching: as JSON files, by repository, task and API. A failure is never served.
    cache_policy=INPUTS - "shared" + CacheKeyFnPolicy(cache_key_fn=task_and_api),
    cache_expiration=timedelta(hours=20),  # not a day: a run each morning is to fetch again
    result_serializer=JSONSerializer(object_decoder=None),  # so that no response can name a class
)
def resilient_fetch_stats(github_repo: str, shared: "Shared | None" = None) -> dict:
    """`fetch_stats`, in its turn. Raises a `RuntimeError` if the request was not sent."""
    shared = shared or Shared()  # its own: a slot for itself, and a refusal holds back no other
    take_turn(github_repo, shared)
    try:
        return with_stars(fetch_stats.fn(github_repo))
    except httpx.HTTPStatusError as error:
        obey(error.response, shared)
        raise BadResponseError(error.response) from None


named_get_stars = get_stars.with_options(task_run_name="get_stars {repo_stats[full_name]}")


@flow(task_runner=ThreadPoolTaskRunner(MAX_WORKERS), persist_result=False, result_serializer="json")
def show_stars(github_repos: list[str]) -> dict[str, int]:
    """Print `{repo}: {count} stars` for each repository, in the order given.

    Returns `{repo: count}`. Raises `ValueError` for a bad name, address or token, before any
    request, and `IncompleteError` if some repositories failed, after all the others are done.
    """
    check_arguments(github_repos)
    if not (limit := ensure_limit()).active:
        get_run_logger().warning(f"the limit {limit.name} is not active: it holds nothing back")
    repos, shared = list(dict.fromkeys(github_repos)), Shared()
    try:
        results = resilient_fetch_stats.map(repos, unmapped(shared)).result(raise_on_failure=False)
    finally:
        shared.over.set()  # no task waits any longer, also if the run is interrupted
    stars, failures = {}, {}
    for repo, stats in zip(repos, results, strict=True):
        if isinstance(stats, dict):
            stars[repo] = named_get_stars(stats)
            print(f"{repo}: {stars[repo]} stars")
        else:
            failures[repo] = stats
    if failures:
        raise IncompleteError(stars, failures)
    return stars


# --- GitHub's responses: the client, and what each response means ---------------------------------
# What may pass, besides some statuses. (A cached result that is being written is half a JSON.)
TRANSIENT = httpx.TransportError, httpx.DecodingError, JSONDecodeError, UnicodeDecodeError
TRANSIENT += (ConcurrencySlotAcquisitionError,)
CREATING = Lock()  # a cache has none: many threads would create many clients
# Dask (lesson 7) pickles requests: without their headers, for there is the token.
copyreg.pickle(httpx.Request, lambda request: (httpx.Request, (request.method, request.url)))


def check_arguments(github_repos: list[str]) -> None:
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
    with CREATING:
        return client_for(api_url(), token())


@lru_cache(maxsize=9)  # a process that runs for months may see many tokens
def client_for(address: str, token: str) -> httpx.Client:
    if not is_http(address):
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
            follow_redirects=True,  # a renamed repository: 301
            event_hooks={"response": [read_in_time]},
        )
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        read = re.compile("(all|https?|no)_proxy|ssl_cert_.*", re.I)
        raise ValueError(f"{', '.join(filter(read.fullmatch, os.environ))}: {error}") from error


def is_http(address: str, base: str | httpx.URL = "") -> bool:
    """Whether a request can be sent to this address, which must not have a password in it."""
    with suppress(httpx.InvalidURL, UnicodeError):
        url = httpx.URL(base).join(address)
        host = url.host.encode("idna")  # as a socket will: two dots, or 64 letters, are no name
        usual = url.scheme in ("http", "https") and (url.port or 0) < 65536 and not url.userinfo
        return usual and b"%" not in host != b""
    return False


def read_in_time(response: httpx.Response) -> None:
    """Read a body against a clock: httpx's own time-out starts again with each piece."""
    location = response.headers.get("location", "")
    if not is_http(location, base=response.url):  # a socket would have an error of its own for it
        raise httpx.UnsupportedProtocol(f"a redirect to {location!r:.80}")
    kind = response.headers.get("content-type", "")
    if response.is_success and "html" in kind:
        raise httpx.DecodingError(f"no JSON but {kind} from {response.url}; is it a log-in page?")
    pieces, end = [], time.monotonic() + LONGEST_READ
    for piece in response.stream:
        pieces.append(piece)
        if time.monotonic() > end:
            raise httpx.ReadTimeout(f"the response took more than {LONGEST_READ} s")
    response.stream.close()
    response.stream = httpx.ByteStream(b"".join(pieces))


def with_stars(stats: object) -> dict:
    """A response that has a star count; else it raises `ValueError`, and nothing is cached."""
    match stats:
        case {"full_name": str(), "stargazers_count": int()}:
            return stats | {"temp_clone_token": None}  # a private repository's is a secret
    raise ValueError(f"the response is no repository with a star count: {stats!r:.50}")


def is_refusal(response: httpx.Response) -> bool:
    """Whether GitHub refused because of too many requests, so that the whole run must wait."""
    headers = response.headers
    limited = headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers
    limited = limited or re.search("(?i)rate limit|abuse", response.text)
    return response.status_code == 429 or (response.status_code == 403 and bool(limited))


def seconds_to_wait(response: httpx.Response) -> float:
    """How long GitHub asks to wait before the next attempt; 0 if it does not."""
    after, reset = (response.headers.get(name, "") for name in ("retry-after", "x-ratelimit-reset"))
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    if not is_refusal(response):
        return 0.0
    if response.headers.get("x-ratelimit-remaining") == "0" and reset.isdecimal():
        return max(0.0, float(reset) - time.time())
    return 60.0  # as GitHub's documentation says


class BadResponseError(httpx.HTTPStatusError):
    """A response with an error status, told in a line, in GitHub's own words."""

    def __init__(self, response: httpx.Response):
        words, status = response.reason_phrase, response.status_code
        with suppress(ValueError, TypeError, KeyError):
            words = " ".join(ascii(response.json()["message"]).strip("'\"").split())[:150]
        words = f"{status} from {response.url.netloc.decode()}: {words}"
        if wait := seconds_to_wait(response):
            words += f"; it asks to wait {wait:.0f} s"
        if status in (401, 403, 429):
            words += f"; {'a' if token() else 'no'} GITHUB_TOKEN is set"
        super().__init__(words, request=response.request, response=response)

    __repr__ = httpx.HTTPStatusError.__str__

    def __reduce__(self):  # an `HTTPStatusError` cannot be unpickled
        return BadResponseError, (self.response,)


class IncompleteError(RuntimeError):
    """Some repositories failed: `failures` has their exceptions, `stars` what the others have."""

    def __init__(self, stars: dict[str, int], failures: dict[str, Exception]):
        self.stars, self.failures = stars, failures

    def __str__(self) -> str:
        failed, all_of_them = len(self.failures), len(self.failures) + len(self.stars)
        lines = [f"{repo}: {error!r}" for repo, error in self.failures.items()]
        return "\n".join([f"{failed} of {all_of_them} repositories failed ({api_url()})", *lines])


# --- Waiting: what the tasks of a run share, and the limit ----------------------------------------
class Shared:
    """What the tasks of a flow run share, in one process."""

    def __init__(self):
        self.turn = Lock()  # of the task that takes slots, for all that wait
        self.over = Event()  # the flow run
        self.not_before = 0.0  # no request is sent before this moment (monotonic seconds)
        self.why = "the run is over"  # the reason for that
        self.refusing = Lock()  # held to change these two
        self.waiting = []  # the repositories whose tasks wait for their turn
        self.limit = ""  # its name
        self.slots = 0  # of it, taken for those that wait, and not yet used
        self.full = 0.0  # since when it has no free slot; 0: it has some
        self.told = -60.0  # the last line in the log about that

    def __reduce__(self):  # Dask pickles it: there each task gets one of its own
        return Shared, ()


def slots_to_take(shared: Shared) -> int:
    """A slot for each task that waits, or as many as are free. If none is, sleep a little."""
    try:  # look first: a vain attempt throws away what has grown, and sleeps until its time-out
        limit = ensure_limit()
    except httpx.HTTPError as error:  # Prefect's client has retried for a minute: enough for all
        shared.not_before, shared.why = float("inf"), f"Prefect's server failed: {error}"
        return 0
    free = limit.limit - limit.active_slots if limit.active else MAX_WORKERS
    slot = 1 / (limit.slot_decay_per_second or 1)  # seconds until one more is free
    now, count = time.monotonic(), 1 + len(shared.waiting)
    shared.limit, shared.full = limit.name, free <= 0 and (shared.full or now)
    # A second after that acquire anyway: some servers do not show what has grown back.
    if not shared.full or now - shared.full > min(slot, 60) + 1:
        shared.full = 0.0
        return min(max(free, 1), count)
    if now - shared.told > 60:
        shared.told = now
        get_run_logger().warning(f"{count} wait for slots of {limit.name}, one each {slot:.3g} s")
    shared.over.wait(min(slot / 20, 3))
    return 0


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


# --- The script -----------------------------------------------------------------------------------
SIGNALS = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)
DEFAULTS = {
    settings.PREFECT_CLIENT_RETRY_EXTRA_CODES: {500},  # retried, as 503 is
    settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # its thread takes a second to end
    settings.PREFECT_SERVER_EPHEMERAL_ENABLED: True,
    settings.PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,  # 20 are too few
    settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,  # offline, it would log an error
    settings.PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED: False,  # two writes at once stall
    settings.PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE: 200,
}


def main(argv: list[str] | None = None) -> int:
    """Run `show_stars` as from the command line. Returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("repos", nargs="*", metavar="OWNER/NAME", default=REPOS)
    repos = parser.parse_args(argv).repos
    if proxies := getproxies_environment():  # none is used for what is on this machine
        os.environ["no_proxy"] = f"{proxies.get('no', '')},127.0.0.1,localhost"
    try:
        check_arguments(repos)
    except ValueError as error:
        parser.error(str(error))
    server = settings.PREFECT_API_URL.value()
    try:
        with settings.temporary_settings(set_defaults=DEFAULTS):
            run(repos, server)
    except IncompleteError as error:
        print(error, file=sys.stderr)
        return 1
    except (LookupError, TypeError, AttributeError, NameError):
        raise  # a mistake in this file
    except Exception as error:
        print(f"The Prefect server ({server or 'temporary'}) failed: {error!r}", file=sys.stderr)
        return 3
    return 0


def run(repos: list[str], server: str | None) -> None:
    """Run `show_stars`, and print below its logs."""
    if not server:
        print("Starting a temporary Prefect server, which takes a moment", file=sys.stderr)
        from prefect.server.database import provide_database_interface as database

        run_coro_as_sync(database().create_db())  # what is wrong with it shows here, at once
    try:
        with redirect_stdout(io.StringIO()) as out:
            show_stars.with_options(log_prints=False)(repos)
    finally:
        with suppress(OSError):  # a full disk, or nobody reads it
            print(out.getvalue(), end="", flush=True)


def one_line(record: logging.LogRecord) -> bool:
    """A log filter: no tracebacks, and no line that a run's final state repeats."""
    message, error = record.getMessage(), record.exc_info
    if error:
        record.msg, record.args = f"{message}: {error[1]!r}", ()
        record.exc_info = record.exc_text = None
    return not (error and message.startswith(("Encountered exception", "Task run failed")))


def end(code: int) -> None:
    """End the process within ten seconds: without its server, Prefect would wait for hours."""
    timer = Timer(10, os._exit, [code])
    timer.daemon = True
    timer.start()
    sys.stdout = None  # what could not be written there is not tried once more
    sys.exit(code)


def interrupt(number: int, _) -> None:
    """What Ctrl-C, SIGTERM and SIGHUP do, once."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # a second one would interrupt the end
    with suppress(OSError):  # nobody may be there to read it
        os.write(2, b"Interrupted. What was fetched is cached.\n")
    end(128 + number)


if ALONE:
    logging.raiseExceptions = False  # the interrupt may come while a line is written
    for handler in logging.getLogger().handlers:
        handler.addFilter(one_line)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    end(main())
elif __name__ == "__main__":
    main()
