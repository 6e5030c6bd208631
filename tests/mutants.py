"""Does a regression get caught? Makes one at a time in a copy of the project, and runs a test.

    python tests/mutants.py                 all of them, three at a time: ten minutes
    python tests/mutants.py retries cache   those with one of the words in their name

Prints a table of what caught each: the named test or lesson must fail, by an assertion and not
because it hangs. Exits with 1 if something was not caught, or if a named one fails without any
change.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 3
PIPELINE, SCRIPT = "tests/test_pipeline.py::test_", "tests/test_script.py::test_"
FAULTS, HOSTILE = "tests/test_faults.py::test_", "tests/test_hostile_input.py::test_"
KERNELS, GAUNTLET = "tests/test_kernels.py::test_", "tests/test_gauntlet.py::test_"
LESSON, GITHUB = "tests/test_lesson.py::test_", "tests/test_fake_github.py::test_"
PRACTICE = "tests/test_practice_api.py::test_"
MORNING = "tests/test_every_morning.py::test_"

# By file: the name of a change, the test or lesson that catches it, what is replaced, and by what.
MUTANTS = {
    "pipeline.py": [
        (
            "no raise_for_status",
            f"{PIPELINE}after_three_retries_it_gives_up",
            *("    response.raise_for_status()\n", ""),
        ),
        ("no retries", f"{PIPELINE}what_is_transient_is_retried", "retries=3,", "retries=0,"),
        (
            "no backoff",
            f"{PIPELINE}the_backoff_is_exponential_with_jitter",
            *("exponential_backoff(backoff_factor=1)", "[1, 1, 1]"),
        ),
        (
            "no jitter",
            f"{PIPELINE}the_backoff_is_exponential_with_jitter",
            *("retry_jitter_factor=0.5", "retry_jitter_factor=0"),
        ),
        (
            "a 404 is retried",
            f"{PIPELINE}what_lasts_fails_at_once_alone_and_is_never_cached",
            *("    retry_condition_fn=is_transient,\n", ""),
        ),
        (
            "a lost connection is not retried",
            f"{PIPELINE}what_is_transient_is_retried",
            *("TRANSIENT = httpx.TransportError, ", "TRANSIENT = "),
        ),
        (
            "a cached result that is being written is a failure",
            f"{PIPELINE}a_result_that_another_process_is_just_writing_is_read_again",
            *("DecodingError, JSONDecodeError, ", "DecodingError, "),
        ),
        (
            "no cap on threads",
            f"{PIPELINE}has_no_more_requests_under_way_than_workers",
            *("ThreadPoolTaskRunner(MAX_WORKERS)", "ThreadPoolTaskRunner()"),
        ),
        (
            "results out of order",
            f"{PIPELINE}prints_and_returns_the_counts_in_the_order_asked",
            *("zip(repos, results, strict=True)", "sorted(zip(repos, results))"),
        ),
        (
            "the first failure ends all",
            f"{PIPELINE}what_lasts_fails_at_once_alone_and_is_never_cached",
            *(".result(raise_on_failure=False)", ".result()"),
        ),
        (
            "an empty list is nothing to do",
            f"{PIPELINE}a_generator_is_no_silent_nothing",
            *("if bad or not github_repos:", "if bad:"),
        ),
        (
            "no names in the dashboard",
            f"{PIPELINE}the_dashboard_has_names_and_an_arrow_for_each_repository",
            *('    task_run_name="fetch_stats {github_repo}",\n', ""),
        ),
        (
            "no arrows in the dashboard",
            f"{PIPELINE}the_dashboard_has_names_and_an_arrow_for_each_repository",
            *("named_get_stars(stats)", "named_get_stars(dict(stats))"),
        ),
        (
            "no timeout",
            f"{PIPELINE}an_api_that_accepts_and_never_answers_is_given_up",
            *("timeout=httpx.Timeout(10, connect=5, pool=None)", "timeout=None"),
        ),
        (
            "a redirect is not followed",
            f"{PIPELINE}a_renamed_repository_is_followed",
            *("follow_redirects=True", "follow_redirects=False"),
        ),
        (
            "the token goes to any host",
            f"{PIPELINE}the_token_goes_to_the_api_and_to_no_other_host",
            *('event_hooks={"response"',
              'event_hooks={"request": [lambda r: r.headers.update(headers)], "response"'),
        ),
        (
            "the token is in a pickled error",
            f"{HOSTILE}the_token_is_told_to_nobody",
            *("(request.method, request.url)", "(request.method, request.url, None, "
              "request.headers)"),
        ),
        (
            "an HTTP error cannot be unpickled",
            f"{PIPELINE}on_dask_a_failure_is_the_same_as_with_threads",
            *("    def __reduce__(self):  # an", "    def reduced(self):  # an"),
        ),
        (
            "any name goes",
            f"{HOSTILE}no_bad_name_causes_a_request",
            *("not name.fullmatch(repo)", "not name.match(repo)"),
        ),
        (
            "an answer without a count is cached",
            f"{PIPELINE}what_lasts_fails_at_once_alone_and_is_never_cached",
            *('"stargazers_count": int()}', '"id": int()}'),
        ),
        (
            "Prefect's decoder for what is cached",
            f"{HOSTILE}an_answer_cannot_choose_what_is_made_of_it",
            *("JSONSerializer(object_decoder=None)", "JSONSerializer()"),
        ),
        (
            "pickle instead of JSON",
            f"{PIPELINE}results_are_json_that_expires_before_the_next_morning",
            *("JSONSerializer(object_decoder=None)", '"pickle"'),
        ),
        (
            "no cache",
            f"{PIPELINE}run_again_fetches_nothing",
            *('cache_policy=INPUTS - "shared" + CacheKeyFnPolicy(cache_key_fn=task_and_api)',
              "cache_policy=None"),
        ),
        (
            "no task in the cache key",
            f"{PIPELINE}the_key_has_the_task",
            *('f"{context.task.name} {api_url()}"', "api_url()"),
        ),
        (
            "no API in the cache key",
            f"{PIPELINE}the_key_has_the_api",
            *('f"{context.task.name} {api_url()}"', "context.task.name"),
        ),
        (
            "cached for a second",
            f"{PIPELINE}results_are_json_that_expires_before_the_next_morning",
            *("timedelta(hours=20)", "timedelta(seconds=1)"),
        ),
        (
            "no limit",
            f"{PIPELINE}takes_a_slot_for_each_request_and_none_for_a_cached_result",
            *("rate_limit(shared.limit, occupy=count, strict=True, timeout_seconds=3)", "pass"),
        ),
        (
            "a slot for many",
            f"{PIPELINE}takes_a_slot_for_each_request_and_none_for_a_cached_result",
            *("occupy=count, ", ""),
        ),
        (
            "more slots than wait",
            f"{PIPELINE}a_task_called_alone_takes_one_slot",
            *("min(max(free, 1), count)", "min(max(free, 1), 16)"),
        ),
        (
            "more slots than the limit has",
            f"{PIPELINE}a_limit_that_is_lowered_in_the_middle_loses_nothing",
            *("min(max(free, 1), count)", "count"),
        ),
        (
            "the look is the truth",
            f"{PIPELINE}a_limit_that_nobody_can_see_is_asked_for_all_the_same",
            *("not shared.full or now - shared.full > min(slot, 60) + 1", "not shared.full"),
        ),
        (
            "somebody's limit is changed",
            f"{PIPELINE}creates_a_limit_for_each_allowance_and_changes_none_that_exists",
            *("return prefect.read_global_concurrency_limit_by_name(name)\n        with",
              "return prefect.upsert_global_concurrency_limit_by_name(name, slots, 1) or prefect"
              ".read_global_concurrency_limit_by_name(name)\n        with"),
        ),
        (
            "a limit that somebody has just created is changed",
            f"{PIPELINE}a_limit_that_somebody_creates_at_the_same_moment_is_left_as_it_is",
            *("create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, **size))",
              "upsert_global_concurrency_limit_by_name(name, **size)"),
        ),
        (
            "one limit for two allowances",
            f"{PIPELINE}creates_a_limit_for_each_allowance_and_changes_none_that_exists",
            *('("github-api-token", 800', '("github-api", 800'),
        ),
        (
            "twice GitHub's hour",
            f"{PIPELINE}creates_a_limit_for_each_allowance_and_changes_none_that_exists",
            *('("github-api", 50, 10)', '("github-api", 60, 60)'),
        ),
        (
            "nobody says that the limit is switched off",
            f"{PIPELINE}a_limit_that_is_not_active_holds_nothing_back_and_that_is_said",
            *("if not (limit := ensure_limit()).active:", "if not ensure_limit():"),
        ),
        (
            "a lost slot is used later",
            f"{PIPELINE}a_slot_that_comes_before_the_time_is_over_is_not_used",
            *("not shared.slots or time.monotonic() < shared.not_before:", "not shared.slots:"),
        ),
        (
            "who waits for a slot hears nothing of GitHub",
            f"{PIPELINE}who_waits_for_a_slot_hears_that_the_wait_for_github_is_too_long",
            *("    shared.over.wait(min(slot / 20, 3))\n    return 0",
              "    shared.over.wait(slot)\n    return count"),
        ),
        (
            "nobody says that it waits",
            f"{SCRIPT}interrupted_while_workers_wait_for_a_slot",
            *('get_run_logger().warning(f"{count} wait', 'str(f"{count} wait'),
        ),
        (
            "a line for each look",
            f"{PIPELINE}once_a_minute_it_says_that_it_waits",
            *("shared.told > 60", "self.told > 0"),
        ),
        (
            "it says once that it waits",
            f"{PIPELINE}once_a_minute_it_says_that_it_waits",
            *("shared.told > 60", "self.told > 6000"),
        ),
        (
            "an interrupt ends no wait",
            f"{KERNELS}the_life_of_two_kernels",
            *("        shared.over.set()", "        pass"),
        ),
        (
            "SIGTERM as the system has it",
            f"{SCRIPT}interrupted_while_workers_wait_for_a_slot",
            *("SIGNALS = signal.SIGINT, signal.SIGTERM, ", "SIGNALS = signal.SIGINT, "),
        ),
        (
            "given up for good",
            f"{PIPELINE}a_flow_run_that_is_retried_starts_afresh",
            *("list(dict.fromkeys(github_repos)), Shared()",
              "list(dict.fromkeys(github_repos)), vars(Shared).get('one') or Shared()\n"
              "    Shared.one = shared"),
        ),
        (
            "a flow run cannot be retried",
            f"{PIPELINE}a_flow_with_retries_asks_again_only_for_what_is_missing",
            *("raise IncompleteError(stars, failures)", "return __import__('prefect').states"
              ".Failed(data=IncompleteError(stars, failures))"),
        ),
        (
            "a wait of hours is allowed",
            f"{PIPELINE}a_spent_allowance_is_not_asked_again",
            *("if wait > LONGEST_WAIT or", "if wait > 1e9 or"),
        ),
        (
            "a rate limit is for one repository",
            f"{PIPELINE}nobody_asks_before_the_time_is_over_that_github_names",
            *("    if is_refusal(response):\n", "    if False:\n"),
        ),
        (
            "a later time is not learned",
            f"{PIPELINE}each_time_that_github_names_is_over",
            *("if until > shared.not_before:", "if shared.not_before < time.monotonic():"),
        ),
        (
            "a server error is for all",
            f"{PIPELINE}a_server_error_with_a_long_wait_is_no_rate_limit",
            *("    if is_refusal(response):\n", "    if wait:\n"),
        ),
        (
            "retry-after is ignored",
            f"{PIPELINE}how_long_github_asks_to_wait",
            *('for name in ("retry-after",', 'for name in ("retry-before",'),
        ),
        (
            "a proxy is asked for this machine",
            f"{SCRIPT}no_proxy_is_asked_for_what_is_on_this_machine",
            *("if proxies := getproxies_environment():", "if proxies := {}:"),
        ),
        (
            "a temporary server writes one by one",
            f"{SCRIPT}on_a_temporary_server",
            *("RECORDER_BATCH_SIZE: 200", "RECORDER_BATCH_SIZE: 1"),
        ),
        (
            "a mistake in the file is the server's",
            f"{SCRIPT}a_mistake_in_the_file_is_not_told_as_the_servers",
            *("LookupError, TypeError, AttributeError, NameError", "ZeroDivisionError"),
        ),
        (
            "exit code 0 in any case",
            f"{SCRIPT}a_failure_shows_the_rest_and_one_line",
            *("        return 1\n", "        return 0\n"),
        ),
        (
            "what was printed is lost when the server is gone",
            f"{SCRIPT}a_prefect_server_gone_for_good_is_an_error_and_no_hang",
            *('print(out.getvalue(), end="", flush=True)', 'print(out.getvalue(), end="")'),
        ),
        (
            "a full disk makes it hang when the server is gone",
            f"{SCRIPT}a_prefect_server_gone_for_good_is_an_error_and_no_hang",
            *("with suppress(OSError):  # a full disk", "with suppress():  # a full disk"),
        ),
        (
            "a clone token is kept in the cache",
            f"{PIPELINE}the_token_of_a_private_repository_is_not_kept",
            *(' | {"temp_clone_token": None}', ""),
        ),
        (
            "a shorter refusal ends a longer one",
            f"{PIPELINE}a_shorter_wait_does_not_replace_a_longer_one",
            *("if until > shared.not_before:", "if wait:"),
        ),
        (
            "the longest wait is an hour",
            f"{PIPELINE}the_longest_wait_is_two_minutes",
            *("LONGEST_WAIT = 120", "LONGEST_WAIT = 3600"),
        ),
        (
            "a refusal that is heard at the same moment is lost",
            f"{PIPELINE}two_waits_at_the_same_moment_are_both_obeyed",
            *("with shared.refusing:", "if True:"),
        ),
        (
            "a task without a run's wait is retried at once",
            f"{PIPELINE}a_task_called_alone_waits_as_told_before_it_is_retried",
            *("        shared.over.wait(wait)\n\n", "        pass\n\n"),
        ),
        (
            "a client for each thread",
            f"{PIPELINE}all_threads_have_one_client",
            *("    with CREATING:\n        return", "    if True:\n        return"),
        ),
        (
            "clients are kept for ever",
            f"{PIPELINE}a_process_that_sees_many_tokens_keeps_few_clients",
            *("@lru_cache(maxsize=9)", "@lru_cache(maxsize=None)"),
        ),
        (
            "what the run shares is in the cache key",
            f"{PIPELINE}in_a_flow_of_the_readers_own_it_is_shared_or_not_and_cached_all_the_same",
            *('INPUTS - "shared" + ', "INPUTS + "),
        ),
        (
            "a 408 is not retried",
            f"{PIPELINE}what_is_transient_is_retried",
            *(" or response.status_code == 408", ""),
        ),
        (
            "a body that trickles has no end",
            f"{FAULTS}each_fault_alone",
            *("        if time.monotonic() > end:\n", "        if False:\n"),
        ),
        (
            "a log-in page is half a JSON",
            f"{FAULTS}each_fault_alone",
            *('if response.is_success and "html" in kind:', "if False:"),
        ),
        (
            "any redirect goes",
            f"{FAULTS}each_fault_alone",
            *("if not is_http(location, base=response.url):", "if False:"),
        ),
        (
            "a slot that Prefect's server failed to give is a failure",
            f"{PIPELINE}a_slot_that_cannot_be_acquired_once_is_no_failure",
            *("TRANSIENT += (ConcurrencySlotAcquisitionError,)", ""),
        ),
        (
            "a guest ends its host",
            f"{SCRIPT}as_a_guest_it_leaves_the_process_as_it_was",
            *("sys.flags.interactive or", "False and"),
        ),
        (
            "messages in stdout if stderr is closed",
            f"{SCRIPT}stdout_has_only_stars_if_stderr_is_closed",
            *('sys.stderr = sys.stderr or open(os.devnull, "w")', "pass"),
        ),
        (
            "each Ctrl-C is heard",
            f"{SCRIPT}impatience_leaves_no_traceback_and_no_server",
            *("signal.signal(one, signal.SIG_IGN)", "pass"),
        ),
    ],
    "notebooks/background.py": [
        (
            "a second server for a second kernel",
            f"{LESSON}several_kernels_at_once_start_one_server",
            *('return server_url(version("prefect")) or _launch()', "return _launch()"),
        ),
        (
            "anybody's process is ended",
            f"{LESSON}a_stale_address_heals_and_ends_no_foreign_process",
            *("if HOME.samefile(server.cwd()) and ", "if "),
        ),
    ],
    "notebooks/lesson.py": [
        (
            "the reader's Prefect is used",
            f"{LESSON}an_address_and_its_token_stay_together",
            *('    os.environ.pop("GITHUB_API_URL", None)\n', ""),
        ),
        (
            "the cache is never cleared",
            f"{PIPELINE}creates_a_limit_for_each_allowance_and_changes_none_that_exists",
            *("    shutil.rmtree(STORAGE, ignore_errors=True)", "    pass"),
        ),
    ],
    "notebooks/gauntlet.py": [
        (
            "another order will do",
            f"{GAUNTLET}lines_in_another_order_and_a_run_that_hides_a_loss",
            *("printed == good and run.state", "run.state"),
        ),
        (
            "a run that hides a loss will do",
            f"{GAUNTLET}lines_in_another_order_and_a_run_that_hides_a_loss",
            *(' and run.state == "FAILED"', ""),
        ),
        (
            "made-up counts pass",
            f"{GAUNTLET}a_flow_that_sends_nothing_keeps_no_promise",
            *("if any(run.wrong for run in self.runs):", "if False:"),
        ),
        (
            "what was not attacked holds",
            f"{GAUNTLET}a_flow_that_sends_nothing_keeps_no_promise",
            *("        if not attacked:\n", "        if False:\n"),
        ),
        (
            "too early obeys",
            "notebooks/04_rate_limiting.ipynb",
            *("arrived[1] - arrived[0] < 5", "arrived[1] - arrived[0] < 0"),
        ),
        (
            "any number in flight",
            f"{GAUNTLET}a_busy_machine_hides_no_request_in_flight",
            *("holds = arena.api.in_flight_max <= IN_FLIGHT", "holds = True"),
        ),
        (
            "responses are not held back",
            f"{GAUNTLET}a_busy_machine_hides_no_request_in_flight",
            *("    arena.api.hold = hold\n", ""),
        ),
        (
            "a request needs no slot",
            f"{GAUNTLET}what_takes_no_slot_does_not_stay_within_the_limit",
            *("holds=taken >= sent", "holds=True"),
        ),
        (
            "a stopped run may send on",
            f"{GAUNTLET}a_run_that_ends_and_sends_on_has_not_stopped",
            *(' and more == "sent nothing more"', ""),
        ),
        (
            "two boards at once",
            f"{GAUNTLET}boards_take_turns_and_leave_the_limit_as_it_was",
            *('lock.execute("BEGIN EXCLUSIVE")', 'lock.execute("BEGIN")'),
        ),
        (
            "the limit stays as a round left it",
            f"{GAUNTLET}boards_take_turns_and_leave_the_limit_as_it_was",
            *("        if before:\n", "        if False:\n"),
        ),
        (
            "what was not reached holds",
            "notebooks/07_scaling_out.ipynb",
            *("if reached else NOT_REACHED", "if reached else HOLDS"),
        ),
        (
            "any morning is solved",
            f"{MORNING}each_part_of_the_solution_keeps_its_promise",
            *("all(what == HOLDS for", "any(what == HOLDS for"),
        ),
    ],
    "notebooks/runs.py": [
        (
            "the settings of an older run",
            f"{GAUNTLET}a_run_knows_what_its_kernel_knows_now",
            *('    prefect.context.GLOBAL_SETTINGS_CONTEXT = job["settings"]\n', ""),
        ),
    ],
    "notebooks/practice_api.py": [
        (
            "no rate limit",
            f"{GITHUB}rate_limit",
            *("within_limit = used + cost <= limit or cost == 0", "within_limit = True"),
        ),
        (
            "a fault lasts for ever",
            f"{PRACTICE}faults_come_first_in_first_out",
            *("            fault.times -= 1\n", ""),
        ),
        (
            "reset keeps the log",
            f"{PRACTICE}reset_restores_everything",
            *("self._log, self._faults, self._windows = [], {}, {}",
              "self._faults, self._windows = {}, {}"),
        ),
        (
            "answers do not overlap",
            f"{PRACTICE}requests_overlap",
            *("await _disconnected(receive)  #", "time.sleep(self.latency)  #"),
        ),
    ],
}  # fmt: skip


def run(project: Path, file: str, old: str, new: str, tests: list[str]) -> tuple[str, str]:
    """Run tests in a changed copy of the project. Returns the first that failed, and how."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(project, copy)
        source = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(source.replace(old, new, 1), encoding="utf-8")
        options = ["-x", "-q", "-n0", "-rfE", "--tb=line", "--show-capture=no"]
        limits = ["-o", "timeout=200", "-o", "faulthandler_timeout=230"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *limits, *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "250"},
            capture_output=True,
            text=True,
        )
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/]+?::.+?)(?: - (.*))?$", done.stdout, re.M)
    if done.returncode == 0:
        return "nothing", ""
    if done.returncode != 1 or not failed:
        return "nothing", (done.stdout + done.stderr)[-300:]
    return failed[1], failed[2] or ""


def main() -> int:
    words = sys.argv[1:] or [""]
    chosen = [
        (file, name, test, old, new)
        for file, mutants in MUTANTS.items()
        for name, test, old, new in mutants
        if any(word in name for word in words)
    ]
    for file, name, _, old, _ in chosen:
        if old not in (ROOT / file).read_text(encoding="utf-8"):
            sys.exit(f"{name}: {old!r} is not in {file} any more")
    wrong = 0
    print("| File | Change | Caught by | How |\n|:--|:--|:--|:--|")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as threads:
        project = Path(folder, "project")  # as it is now, whatever is edited meanwhile
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        tests = sorted({test for _, _, test, _, _ in chosen})
        unchanged = threads.submit(run, project, "pipeline.py", "", "", tests)
        runs = [
            threads.submit(run, project, file, old, new, [test])
            for file, _, test, old, new in chosen
        ]
        for (file, name, *_), future in zip(chosen, runs, strict=True):
            caught, how = future.result()
            good = caught != "nothing" and "from pytest-timeout" not in how
            wrong += not good
            print(f"| {Path(file).name} | {name} | {caught} | {how[:100]} |", flush=True)
        caught, how = unchanged.result()
        wrong += caught != "nothing"
        print(f"| | no change | {caught} | {how[:100]} |")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
