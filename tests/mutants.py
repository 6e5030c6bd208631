"""Does a regression get caught? Makes one at a time in a copy of the project, and runs the tests.

    python tests/mutants.py             all of them: half an hour
    python tests/mutants.py retries     those with the word in their name

Prints a table of what caught each. Exits with 1 if one was not caught.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = {  # name: what is replaced in pipeline.py, and by what
    "no raise_for_status": ("    response.raise_for_status()\n", ""),
    "retries=0": ("retries=3,", "retries=0,"),
    "no backoff": (
        "    retry_delay_seconds=exponential_backoff(backoff_factor=1),\n"
        "    retry_jitter_factor=0.5,\n",
        "",
    ),
    "a 404 is retried": ("    retry_condition_fn=can_heal,\n", ""),
    "no rate_limit": ("    rate_limit(LIMIT, strict=True)", "    pass"),
    "strict=False": ("strict=True)", "strict=False)"),
    "no cache policy": (
        "cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api)",
        "cache_policy=None",
    ),
    "INPUTS alone as the key": (" + CacheKeyFnPolicy(cache_key_fn=task_and_api)", ""),
    "no API in the key": ('f"{context.task.name} {api_url()}"', "context.task.name"),
    "expiration of a second": ("timedelta(days=1)", "timedelta(seconds=1)"),
    "pickle instead of JSON": ('result_serializer="json"', 'result_serializer="pickle"'),
    "no cap on threads": (
        "ThreadPoolTaskRunner(max_workers=MAX_WORKERS)",
        "ThreadPoolTaskRunner()",
    ),
    "results out of order": (
        "list(dict.fromkeys(check_names(github_repos)))",
        "sorted(check_names(github_repos))",
    ),
    "first failure raised for all": ("    futures.wait()\n", "    futures.result()\n"),
    "a redirect is not followed": ("follow_redirects=True", "follow_redirects=False"),
    "the token goes to another host": (
        'event_hooks={"response": [bound]}',
        'event_hooks={"response": [bound], "request": [lambda r: r.headers.update(headers)]}',
    ),
}


def run(copy: Path) -> list[str]:
    """Run the copy's tests, on the copy's pipeline; return what failed."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "--deselect"]
    pytest += ["tests/test_notebooks.py::test_ruff_has_nothing_to_say"]
    pytest += ["--ignore=tests/test_fake_github.py"]  # it has no part in the pipeline
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(pytest, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    source = (ROOT / "pipeline.py").read_text()
    missed = 0
    print("| Regression | Caught by |\n|:--|:--|")
    for name, (old, new) in {"none": ("", ""), **MUTANTS}.items():
        if wanted not in name:
            continue
        if old not in source:
            sys.exit(f"{name}: {old!r} is not in pipeline.py any more")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "project")
            ignored = shutil.ignore_patterns(".*", "__pycache__")
            shutil.copytree(ROOT, copy, ignore=ignored)
            (copy / "pipeline.py").write_text(source.replace(old, new, 1))
            caught = run(copy)
        by_file = {}
        for test in caught:
            file, _, case = test.partition("::")
            by_file.setdefault(Path(file).name, []).append(case)
        text = ", ".join(
            f"{file} ({len(cases)})" if file.endswith(".ipynb") else f"{file}: {', '.join(cases)}"
            for file, cases in by_file.items()
        )
        print(f"| {name} | {text or '**nothing**'} |", flush=True)
        missed += bool(caught) if name == "none" else not caught
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
