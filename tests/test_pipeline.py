"""`pipeline.py` against the practice API over real HTTP, and a real Prefect server."""

import gc
import json
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import ObjectNotFound
from prefect.filesystems import LocalFileSystem
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry
from test_lesson import until

import lesson
import pipeline
from fake_github import FakeGitHub
from pipeline import MAX_WORKERS, REPOS, IncompleteError, show_stars

ROOT = Path(__file__).parents[1]
STARS = {"PrefectHQ/prefect": 21412, "pydantic/pydantic": 26549, "huggingface/transformers": 155622}
PYDANTIC = "pydantic/pydantic"
DELAYS = pipeline.resilient_fetch_stats.retry_delay_seconds  # the tests shorten them
MANY = [f"load-test/{n}" for n in range(40)]


def statuses(github, repo=PYDANTIC):
    """The answers about one repository, in order."""
    log = github.requests
    return log["status"][log["repository"] == repo].tolist()


def host(github):
    return github.url.removeprefix("http://")


def lines(stars):
    return "".join(f"{repo}: {count} stars\n" for repo, count in stars.items())


def read_limit(name="github-api"):
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name)


# --- The finished flow ----------------------------------------------------------------------------


def test_prints_and_returns_the_counts_in_the_order_asked(github, capsys):
    github.fail(REPOS[0], latency=0.3)  # the first one asked is the last to answer
    assert show_stars(REPOS) == STARS
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" stars")]
    assert printed == [f"{repo}: {count} stars" for repo, count in STARS.items()]


def test_run_again_fetches_nothing(github):
    show_stars(REPOS)
    assert len(github.requests) == 3
    state = show_stars(REPOS, return_state=True)
    assert len(github.requests) == 3
    states = lesson.task_states(state, count=6)
    assert {name: states[name] for name in states if "fetch_stats" in name} == {
        f"fetch_stats {repo}": "Cached" for repo in REPOS
    }


def test_the_dashboard_has_names_and_an_arrow_for_each_repository(github):
    state = show_stars(REPOS, return_state=True)
    lesson.task_states(state, count=6)  # the server has them all
    this_run = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
    with get_client(sync_client=True) as client:
        runs = {run.name: run for run in client.read_task_runs(flow_run_filter=this_run)}
    assert set(runs) == {
        f"{task} {repo}" for task in ("fetch_stats", "get_stars") for repo in REPOS
    }
    for repo in REPOS:
        [arrow] = runs[f"get_stars {repo}"].task_inputs["repo_stats"]
        assert arrow.id == runs[f"fetch_stats {repo}"].id


def test_a_repository_asked_twice_is_fetched_once(github, capsys):
    assert show_stars([*REPOS, *REPOS]) == STARS
    assert len(github.requests) == 3
    assert lines(STARS) in capsys.readouterr().out


def test_a_generator_is_no_silent_nothing(github):
    with pytest.raises(ValueError, match="not a list of repositories"):
        show_stars(repo for repo in REPOS)


def test_has_no_more_requests_under_way_than_workers(github, monkeypatch):
    github.latency = 0.2
    options = {"base_url": github.url, "headers": {"user-agent": "test"}}
    with httpx.Client(**options) as unlimited:
        monkeypatch.setattr(pipeline, "client", lambda: unlimited)
        show_stars(MANY[:24])
    assert 1 < github.in_flight_max <= MAX_WORKERS


def test_a_renamed_repository_is_followed(github):
    assert show_stars(["samuelcolvin/pydantic"]) == {"samuelcolvin/pydantic": STARS[PYDANTIC]}


TRANSIENT = [
    {"status": 500},
    {"status": 502, "html": True},
    {"status": 503},
    {"status": 408},
    {"status": 429, "headers": {"retry-after": "0"}},
    {"status": 403, "headers": {"retry-after": "0"}},
    {"kind": "reset"},
    {"kind": "truncated"},
    {"body": "<html>moved</html>"},
    {"html": True},
    {"body": ""},
    {"body": '{"stargazers_count": 2'},
    {"body": b"<html>caf\xe9</html>"},
    {"headers": {"content-encoding": "gzip"}},
]
LASTING = [
    {"status": 400},
    {"status": 401},
    {"status": 403},
    {"status": 404},
    {"status": 451},
    {"body": [1, 2]},
    {"fields": {"full_name": ...}},
    {"fields": {"stargazers_count": ...}},
    {"fields": {"stargazers_count": None}},
    {"fields": {"stargazers_count": "26549"}},
    {"fields": {"stargazers_count": 2.5}},
]


def test_what_is_transient_is_retried(github):
    faults = dict(zip(MANY, TRANSIENT, strict=False))
    for repo, fault in faults.items():
        github.fail(repo, times=2, **fault)
    assert list(show_stars(list(faults))) == list(faults)
    for repo, fault in faults.items():
        assert len(statuses(github, repo)) == 3, fault
        assert statuses(github, repo)[-1] == 200, fault


def test_what_lasts_fails_at_once_alone_and_is_never_cached(github):
    faults = dict(zip(MANY, LASTING, strict=False))
    for repo, fault in faults.items():
        github.fail(repo, times=None, **fault)
    with pytest.raises(IncompleteError) as failed:
        show_stars([*REPOS, *faults])
    assert failed.value.stars == STARS
    assert list(failed.value.failures) == list(faults)
    first, *others = str(failed.value).splitlines()
    assert first == f"{len(faults)} of {len(faults) + 3} repositories failed ({github.url})"
    assert [line.partition(": ")[0] for line in others] == list(faults)
    for repo, fault in faults.items():
        assert len(statuses(github, repo)) == 1, fault

    github.reset()  # mended: the next run asks for what is missing, and for nothing else
    assert len(show_stars([*REPOS, *faults])) == len(faults) + 3
    assert sorted(github.requests["repository"]) == sorted(faults)


def test_after_three_retries_it_gives_up(github):
    github.fail(PYDANTIC, status=503, times=None)
    with pytest.raises(IncompleteError, match=r"503 from .*: No server is currently"):
        show_stars(REPOS)
    assert statuses(github) == [503] * 4


def test_the_backoff_is_exponential_with_jitter():
    task = pipeline.resilient_fetch_stats
    assert DELAYS == [1, 2, 4]
    assert task.retry_jitter_factor > 0


@pytest.mark.slow
def test_an_api_that_accepts_and_never_answers_is_given_up(github):
    github.latency = 25
    with pytest.raises(httpx.ReadTimeout):
        pipeline.fetch_stats.fn(PYDANTIC)


def test_a_flow_run_that_is_retried_starts_afresh(github):
    github.fail(PYDANTIC, "rate limit")  # for an hour: the run gives up
    given_up = show_stars([PYDANTIC], return_state=True)
    run_id = given_up.state_details.flow_run_id
    with get_client(sync_client=True) as client:  # as Retry in the dashboard does
        client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        again = client.read_flow_run(run_id)
    parameters = {"github_repos": [PYDANTIC]}
    assert run_flow(show_stars, flow_run=again, parameters=parameters) == {PYDANTIC: 26549}
    assert statuses(github) == [403, 200]


def test_a_flow_with_retries_asks_again_only_for_what_is_missing(github):
    github.fail(PYDANTIC, status=404)
    assert show_stars.with_options(retries=1)(REPOS) == STARS
    assert statuses(github) == [404, 200]
    assert len(github.requests) == 4


def test_on_dask_a_failure_is_the_same_as_with_threads(github):
    from distributed import LocalCluster
    from prefect_dask import DaskTaskRunner

    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    with LocalCluster(
        n_workers=1, dashboard_address="127.0.0.1:0", local_directory=lesson.HOME, env=quiet
    ) as cluster:
        runner = DaskTaskRunner(address=cluster.scheduler_address)
        with pytest.raises(IncompleteError) as failed:
            show_stars.with_options(task_runner=runner)([*REPOS, "no/such"])
    assert failed.value.stars == STARS
    assert failed.value.failures["no/such"].response.status_code == 404
    assert str(failed.value).endswith(f"\nno/such: 404 from {host(github)}: Not Found")


# --- Rate limits ----------------------------------------------------------------------------------


def answer(status, headers=None, text=""):
    return httpx.Response(status, headers=headers, text=text)


def test_how_long_github_asks_to_wait():
    spent = {"x-ratelimit-remaining": "0"}
    hour = {"x-ratelimit-reset": str(int(time.time()) + 3600)}
    past = {"x-ratelimit-reset": str(int(time.time()) - 3600)}
    wait = pipeline.seconds_to_wait
    assert wait(answer(429, {"retry-after": "7"})) == 7
    assert wait(answer(503, {"retry-after": "7"})) == 7
    assert wait(answer(403, {"retry-after": "7"} | spent | hour)) == 7
    assert 3500 < wait(answer(403, spent | hour)) <= 3600
    assert wait(answer(403, spent | past)) == 0
    assert wait(answer(403, spent)) == 60
    assert wait(answer(403, hour, "You have exceeded a secondary rate limit.")) == 60
    assert wait(answer(403, text="You have triggered an abuse detection mechanism.")) == 60
    assert wait(answer(503, {"retry-after": "7.5"})) == 7.5
    date = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)}
    assert 590 < wait(answer(503, date)) <= 600
    assert 590 < wait(answer(429, date)) <= 600
    for nonsense in ("soon", "-1", "inf", "1e9", "0x9", ""):
        assert wait(answer(429, {"retry-after": nonsense})) == 60
        assert wait(answer(500, {"retry-after": nonsense})) == 0
    assert wait(answer(500)) == 0
    for status in (400, 401, 403, 404, 408, 451):
        assert wait(answer(status)) == 0


def test_each_time_that_github_names_is_over(github):
    for repo, latency in zip(MANY[:2], (0.5, 1.2), strict=True):
        github.fail(repo, "secondary rate limit", latency=latency, headers={"retry-after": 2})
    show_stars(MANY[:2])
    log = github.requests
    refused = (log["time"] + log["duration"])[log["status"] == 403]
    meanwhile = [log["time"].between(told + 0.5, told + 1.9).sum() for told in refused]
    assert meanwhile == [0, 0]  # half a second is for the client to hear of it


def test_a_shorter_wait_does_not_replace_a_longer_one(github):
    for repo, latency, wait in (MANY[0], 1, 4), (MANY[1], 2, 1):
        github.fail(repo, status=429, latency=latency, headers={"retry-after": wait})
    assert list(show_stars(MANY[:2])) == MANY[:2]
    log = github.requests
    [longer] = log.index[(log["status"] == 429) & (log["repository"] == MANY[0])]
    assert (
        log["time"][log["status"] == 200].min()
        > log["time"][longer] + log["duration"][longer] + 3.5
    )


class SlowToRead(pipeline.Shared):
    """So that another thread comes between a look at `not_before` and a change of it."""

    def look(self):
        moment = vars(self).get("moment", 0.0)
        time.sleep(0.01)
        return moment

    not_before = property(look, lambda self, moment: vars(self).update(moment=moment))


def test_two_waits_at_the_same_moment_are_both_obeyed(monkeypatch):
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: SimpleNamespace(warning=print))
    monkeypatch.setattr(pipeline, "LONGEST_WAIT", 0)  # nobody sleeps
    request = httpx.Request("GET", "http://x/")
    waits = [httpx.Response(429, headers={"retry-after": f"{n}"}, request=request) for n in (99, 9)]
    for turn in range(6):
        shared = SlowToRead()
        with ThreadPoolExecutor(8) as threads:
            for response in (waits * 4)[:: 1 if turn % 2 else -1]:
                threads.submit(pipeline.obey, response, shared)
        assert shared.not_before > time.monotonic() + 90
        assert "99 s" in shared.why


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "free_a_second", "on_their_way"),
    [(5000, 1, MAX_WORKERS - 1), (4, 10, 4)],  # all that ask, and all but a few wait for a slot
)
def test_nobody_asks_before_the_time_is_over_that_github_names(
    github, slots, free_a_second, on_their_way
):
    lesson.new_limit("github-api", slots, free_a_second)
    github.latency = 0.05
    github.fail(MANY[20], status=429, headers={"retry-after": 3})
    assert list(show_stars(MANY)) == MANY
    log = github.requests
    assert statuses(github, MANY[20]) == [429, 200]
    [refused] = log.index[log["status"] == 429]
    told = log["time"][refused] + log["duration"][refused]
    meanwhile = log["time"].between(told, told + 2.5)
    assert meanwhile.sum() <= on_their_way
    assert log["time"].max() > told + 2.5


def test_a_slot_that_comes_before_the_time_is_over_is_not_used(github, monkeypatch):
    def slow(*arguments, **options):  # the refusal arrives between the slot and the request
        acquire(*arguments, **options)
        time.sleep(1)

    acquire = pipeline.rate_limit
    monkeypatch.setattr(pipeline, "rate_limit", slow)
    lesson.new_limit("github-api", 1, 10)
    github.fail("*", status=429, latency=0.5, headers={"retry-after": 4})
    assert list(show_stars(MANY[:2])) == MANY[:2]
    log = github.requests
    assert log["status"].tolist() == [429, 200, 200]
    assert log["time"][1] > log["time"][0] + log["duration"][0] + 3.5


def test_a_spent_allowance_is_not_asked_again(github, monkeypatch):
    monkeypatch.setattr(pipeline, "LONGEST_WAIT", 2)
    github.latency, github.rate_limit, github.rate_window = 0.05, 10, 10
    with pytest.raises(IncompleteError) as failed:
        show_stars(MANY)
    assert len(failed.value.stars) == 10
    assert (github.requests["status"] == 403).sum() <= MAX_WORKERS  # they were on their way
    unsent = [e for e in failed.value.failures.values() if str(e).startswith("not sent: ")]
    assert len(unsent) == len(MANY) - len(github.requests) > 0
    assert all("rate limit exceeded" in str(error) for error in unsent)
    assert all("it asks to wait" in str(error) for error in unsent)


@pytest.mark.slow
def test_a_slot_that_comes_after_the_time_is_over_is_used(github):
    def raise_limit():
        until(lambda: len(github.requests) == 1)
        github.mend()
        time.sleep(5)
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name("github-api", 100, 1e-9)

    lesson.new_limit("github-api", 1, 1e-9)
    for repo in MANY[:8]:  # whichever is the first
        github.fail(repo, status=429, latency=0.5, headers={"retry-after": 1})
    thread = Thread(target=raise_limit)
    thread.start()
    assert list(show_stars(MANY[:8])) == MANY[:8]  # all wait for a slot while the time passes
    thread.join()
    assert read_limit().active_slots == len(github.requests) == 9


def test_who_waits_for_a_slot_hears_that_the_wait_for_github_is_too_long(github, monkeypatch):
    def noted(*arguments, **options):
        acquired.append(options["occupy"])
        return acquire(*arguments, **options)

    acquire, acquired = pipeline.rate_limit, []
    monkeypatch.setattr(pipeline, "rate_limit", noted)
    lesson.new_limit("github-api", 1, 0.2)  # five seconds for a slot
    for repo in MANY[:3]:  # whichever is the first
        github.fail(repo, status=429, headers={"retry-after": 3600})
    with pytest.raises(IncompleteError, match="it asks to wait 3600 s") as failed:
        show_stars(MANY[:3])
    assert len(failed.value.failures) == 3
    assert sum(acquired) == len(github.requests) == 1


def test_the_longest_wait_is_two_minutes():
    def retried(wait):
        response = answer(429, {"retry-after": str(wait)})
        error = httpx.HTTPStatusError("", request=None, response=response)
        return pipeline.is_transient(None, None, SimpleNamespace(data=error))

    assert (retried(120), retried(121)) == (True, False)


@pytest.mark.parametrize("after", [3600, "9" * 40])
def test_a_long_wait_is_an_error_that_names_the_time(github, after):
    github.fail(PYDANTIC, status=429, headers={"retry-after": after}, times=None)
    with pytest.raises(IncompleteError) as failed:
        show_stars([PYDANTIC])
    assert statuses(github) == [429]
    assert f"it asks to wait {float(after):.0f} s; no GITHUB_TOKEN is set" in str(failed.value)


def test_a_server_error_with_a_long_wait_is_no_rate_limit(github):
    github.fail(PYDANTIC, status=503, headers={"retry-after": 300}, times=None)
    with pytest.raises(IncompleteError) as failed:
        show_stars([PYDANTIC, *MANY])  # of which most are asked after its answer
    assert statuses(github) == [503]
    assert list(failed.value.stars) == MANY  # it was for one repository
    assert "503 from" in str(failed.value)
    assert "it asks to wait 300 s" in str(failed.value)
    elsewhere = pickle.loads(pickle.dumps(failed.value))  # as another process has it
    assert (elsewhere.stars, str(elsewhere)) == (failed.value.stars, str(failed.value))
    assert elsewhere.failures[PYDANTIC].response.status_code == 503
    assert "rate limit" not in str(failed.value)
    assert "TOKEN" not in str(failed.value)


# --- The limit ------------------------------------------------------------------------------------


def test_takes_a_slot_for_each_request_and_none_for_a_cached_result(github):
    lesson.new_limit("github-api", 100, 1e-9)
    github.latency = 0.5  # longer than it takes to acquire the next ones
    github.fail(MANY[0], status=503, times=2)
    for _ in range(2):
        show_stars(MANY[:20])
        assert read_limit().active_slots == len(github.requests) == 22


def test_once_a_minute_it_says_that_it_waits(monkeypatch):
    seconds, said = iter(range(10_000, 10_300)), []
    full = {"limit": 1, "active_slots": 1, "active": True, "slot_decay_per_second": 1e-3}
    limit = SimpleNamespace(name="github-api", **full)
    clock = SimpleNamespace(monotonic=lambda: next(seconds))  # a second for each look
    monkeypatch.setattr(pipeline, "ensure_limit", lambda: limit)
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: SimpleNamespace(warning=said.append))
    monkeypatch.setattr(pipeline, "time", clock)
    shared = pipeline.Shared()
    shared.over.set()  # so that it does not sleep
    for _ in range(300):
        pipeline.slots_to_take(shared)
    assert said == ["1 wait for slots of github-api, one each 1e+03 s"] * 5


def test_a_task_called_alone_takes_one_slot(github):
    lesson.new_limit("github-api", 100, 1e-9)
    for repo in MANY[:3]:
        assert pipeline.resilient_fetch_stats(repo)["full_name"] == repo
        time.sleep(1.1)
    assert read_limit().active_slots == len(github.requests) == 3


def test_a_task_called_alone_waits_as_told_before_it_is_retried(github):
    for status in 503, 429:
        github.fail(PYDANTIC, status=status, headers={"retry-after": 1})
    assert pipeline.resilient_fetch_stats(PYDANTIC)["full_name"] == PYDANTIC
    log = github.requests
    assert log["status"].tolist() == [503, 429, 200]
    assert (log["time"].diff()[1:] > 0.99).all()


def test_in_a_flow_of_the_readers_own_it_is_shared_or_not_and_cached_all_the_same(github):
    fetch = pipeline.resilient_fetch_stats

    @flow
    def my_stars(repos):
        shared = pipeline.Shared()
        futures = [fetch.submit(repo, shared=shared) for repo in repos[:3]]
        futures += [fetch.submit(repo) for repo in repos[3:6]]
        futures += fetch.map(repos[6:])
        return [future.result()["full_name"] for future in futures]

    lesson.new_limit("github-api", 100, 1e-9)
    assert my_stars(MANY[:9]) == MANY[:9] == list(show_stars(MANY[:9]))
    assert read_limit().active_slots == len(github.requests) == 9


def test_a_slot_that_cannot_be_acquired_once_is_no_failure(github, monkeypatch):
    def fails_once(*arguments, **options):
        if errors:
            raise errors.pop()
        return acquire(*arguments, **options)

    acquire, errors = pipeline.rate_limit, [ConcurrencySlotAcquisitionError("the server erred")]
    monkeypatch.setattr(pipeline, "rate_limit", fails_once)
    assert show_stars(REPOS) == STARS
    assert not errors


def test_a_process_of_many_runs_does_not_grow(github):
    for _ in range(9):
        show_stars(REPOS)
    gc.collect()
    left = [thing for thing in gc.get_objects() if type(thing) is pipeline.Shared]
    assert len(left) < 5  # Prefect holds the last ones


def test_a_limit_that_is_lowered_in_the_middle_loses_nothing(github):
    def lower():
        until(lambda: len(github.requests) >= 10)
        with get_client(sync_client=True) as client:
            client.upsert_global_concurrency_limit_by_name("github-api", 3, 20)

    lesson.new_limit("github-api", 5000, 5000 / 3600)
    github.latency = 0.1
    thread = Thread(target=lower)
    thread.start()
    assert list(show_stars(MANY)) == MANY
    thread.join()
    assert read_limit().limit == 3  # far fewer than workers that wait
    assert len(github.requests) == len(MANY)


def test_a_limit_that_is_not_active_holds_nothing_back_and_that_is_said(github, caplog):
    lesson.new_limit("github-api", 1, 1e-9)
    with get_client(sync_client=True) as client:
        off = GlobalConcurrencyLimitUpdate(active=False)
        client.update_global_concurrency_limit("github-api", off)
    assert show_stars(REPOS) == STARS
    assert caplog.text.count("the limit github-api is not active") == 1


def test_a_limit_without_decay_is_an_error_that_says_so(github):
    lesson.new_limit("github-api", 5, 0)
    with pytest.raises(IncompleteError, match="Only concurrency limits with slot decay"):
        show_stars([PYDANTIC])


def test_a_limit_that_nobody_can_see_is_asked_for_all_the_same(github, monkeypatch):
    """Servers before Prefect 3.7 report slots without their decay."""
    looks = 0

    def full(client, name):
        nonlocal looks
        looks += 1
        assert looks < 3000, "it looks for ever, and never asks"
        limit = read(client, name)
        limit.active_slots = limit.limit
        return limit

    read = SyncPrefectClient.read_global_concurrency_limit_by_name
    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", full)
    lesson.new_limit("github-api", 4, 10)
    assert list(show_stars(MANY[:12])) == MANY[:12]


def test_creates_a_limit_for_each_allowance_and_changes_none_that_exists(
    github, monkeypatch, request
):
    request.addfinalizer(lambda: lesson.delete_limit("github-api-token"))
    for name, token in (("github-api", ""), ("github-api-token", "for-practice")):
        monkeypatch.setenv("GITHUB_TOKEN", token)
        lesson.delete_limit(name)
        show_stars([PYDANTIC])
        lesson.clear_cache()
        limit = read_limit(name)
        hour = limit.limit + limit.slot_decay_per_second * 3600
        minute = limit.limit + limit.slot_decay_per_second * 60
        assert hour <= (5000 if token else 60)  # requests that GitHub answers
        assert minute <= 900
        assert hour > (4900 if token else 55)

        lesson.new_limit(name, 7, 1e-9)  # somebody's own choice stays
        show_stars([PYDANTIC])
        lesson.clear_cache()
        assert (read_limit(name).limit, read_limit(name).active_slots) == (7, 1)
    assert read_limit("github-api").active_slots == 1  # the other one's is another


def test_a_limit_that_somebody_creates_at_the_same_moment_is_left_as_it_is(github, monkeypatch):
    read, looks = SyncPrefectClient.read_global_concurrency_limit_by_name, []

    def too_early(self, name):
        looks.append(name)
        if len(looks) == 1:
            raise ObjectNotFound(RuntimeError("a moment before it was there"))
        return read(self, name)

    monkeypatch.setattr(SyncPrefectClient, "read_global_concurrency_limit_by_name", too_early)
    lesson.new_limit("github-api", 7, 0.5)
    show_stars([PYDANTIC])
    monkeypatch.undo()
    assert (read_limit().limit, read_limit().slot_decay_per_second) == (7, 0.5)


def test_a_task_called_alone_is_within_a_limit_too(github):
    lesson.delete_limit("github-api")
    pipeline.resilient_fetch_stats(PYDANTIC)
    assert read_limit().active_slots == len(github.requests) == 1


# --- The cache ------------------------------------------------------------------------------------


def test_the_key_has_the_api(github, monkeypatch):
    show_stars([PYDANTIC])
    with FakeGitHub(latency=0) as other:
        monkeypatch.setenv("GITHUB_API_URL", other.url)
        show_stars([PYDANTIC])
        assert len(other.requests) == 1


def test_the_key_has_the_task(github):
    show_stars([PYDANTIC])
    other_task = pipeline.resilient_fetch_stats.with_options(name="fetch_forks")
    assert other_task(PYDANTIC, return_state=True).name == "Completed"


def test_a_result_that_another_process_is_just_writing_is_read_again(github, monkeypatch):
    show_stars([PYDANTIC])
    read, seen = LocalFileSystem.read_path, iter(["whole", "emptied, to be written anew"])

    def read_path(*arguments, **options):
        return read(*arguments, **options) if next(seen, "whole") == "whole" else b""

    monkeypatch.setattr(LocalFileSystem, "read_path", read_path)
    assert show_stars([PYDANTIC]) == {PYDANTIC: STARS[PYDANTIC]}
    assert statuses(github) == [200]
    assert next(seen, None) is None


def test_the_token_of_a_private_repository_is_not_kept(github):
    github.fail(PYDANTIC, fields={"temp_clone_token": "s3cret"})
    show_stars([PYDANTIC])
    (file,) = lesson.saved_files()
    assert "temp_clone_token" in file.read_text(encoding="utf-8")
    assert "s3cret" not in file.read_text(encoding="utf-8")


def test_results_are_json_that_expires_before_the_next_morning(github):
    show_stars([PYDANTIC])
    (file,) = lesson.saved_files()
    record = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(record["result"])["stargazers_count"] == STARS[PYDANTIC]
    left = datetime.fromisoformat(record["metadata"]["expiration"]) - datetime.now().astimezone()
    assert timedelta(hours=19) < left <= timedelta(hours=20)


# --- Addresses, the token -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "api.github.com",
        "ftp://x",
        "http://",
        "https:/x",
        "http://a b",
        " ",
        "http://x:87B7",
        "http://[::1",
        "http://me:secret@x",
        "https://api..github.com",
        f"https://{'a' * 70}.example",
        "http://127.0.0.1:99999",
    ],
)
def test_a_malformed_address_is_named(github, monkeypatch, address):
    monkeypatch.setenv("GITHUB_API_URL", address)
    named = "^" + re.escape("GITHUB_API_URL is not an http(s) address: ")
    for ask, what in (show_stars, [PYDANTIC]), (pipeline.resilient_fetch_stats, PYDANTIC):
        with pytest.raises(ValueError, match=named) as refused:
            ask(what)
        assert "secret" not in str(refused.value)


def test_all_threads_have_one_client(monkeypatch):
    for token in ("for", "practice"):
        monkeypatch.setenv("GITHUB_TOKEN", token)  # none was needed with it
        with ThreadPoolExecutor(60) as threads:
            clients = list(threads.map(lambda _: pipeline.client(), range(60)))
        assert len(set(map(id, clients))) == 1


def test_a_process_that_sees_many_tokens_keeps_few_clients(monkeypatch):
    for number in range(20):  # as those of a GitHub App, which last for an hour
        monkeypatch.setenv("GITHUB_TOKEN", f"token-{number}")
        pipeline.client()
    gc.collect()
    tokens = [c.headers.get("authorization") for c in gc.get_objects() if type(c) is httpx.Client]
    assert 0 < len([token for token in tokens if token and "token-" in token]) < 20


@pytest.fixture
def recorder():
    """A bare server that keeps the headers of each request and redirects or answers them."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append({k.lower(): v for k, v in self.headers.items()})
            self.send_response(301 if self.server.location else 200)
            if self.server.location:
                self.send_header("Location", self.server.location)
            self.end_headers()
            if not self.server.location:
                self.wfile.write(b'{"full_name": "a/b", "stargazers_count": 1}')

        def log_message(self, *_):
            pass

    servers = []

    def start(location=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen, server.location = [], location
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_token_goes_to_the_api_and_to_no_other_host(github, monkeypatch, recorder):
    elsewhere, elsewhere_url = recorder()
    api, api_url = recorder(location=f"{elsewhere_url}/repositories/1")
    monkeypatch.setenv("GITHUB_API_URL", api_url)
    monkeypatch.setenv("GITHUB_TOKEN", " s3cret\n")  # as it comes out of a file
    assert show_stars([PYDANTIC]) == {PYDANTIC: 1}
    assert api.seen[0]["authorization"] == "Bearer s3cret"
    assert "authorization" not in elsewhere.seen[0]
    assert api.seen[0]["user-agent"]
    assert api.seen[0]["accept"] == "application/vnd.github+json"


def test_an_odd_token_is_refused_without_being_told(github, monkeypatch):
    monkeypatch.setenv("GITHUB_TOKEN", "s3\ncret")
    with pytest.raises(ValueError, match="GITHUB_TOKEN is not a token") as refused:
        show_stars([PYDANTIC])
    assert "cret" not in str(refused.value)
