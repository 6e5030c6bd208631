"""Does a regression get caught? Makes one at a time in a copy of the project, and runs the tests.

    python tests/mutants.py                 all of them: a quarter of an hour
    python tests/mutants.py retries cache   those with one of the words in their name

Each runs the lesson that teaches the point, and the tests of the pipeline without those of the
script. Prints a table of what caught it. Exits with 1 if something was not caught, or if the tests
fail without any change.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTANTS = {  # name: the lesson that teaches it; what is replaced in pipeline.py, and by what
    "no change": ("", "", ""),
    "no raise_for_status": ("02_retries", "    response.raise_for_status()\n", ""),
    "retries=0": ("02_retries", "retries=3,", "retries=0,"),
    "no backoff": (
        "02_retries",
        "    retry_delay_seconds=exponential_backoff(backoff_factor=1),\n"
        "    retry_jitter_factor=0.5,\n",
        "",
    ),
    "a 404 is retried": ("02_retries", "    retry_condition_fn=can_heal,\n", ""),
    "no cap on threads": ("03_mapping", "(max_workers=MAX_WORKERS), persist", "(), persist"),
    "results out of order": (
        "03_mapping",
        "list(dict.fromkeys(check_names(github_repos)))",
        "sorted(check_names(github_repos))",
    ),
    "first failure raised for all": (
        "03_mapping",
        "        futures.wait()  #",
        "        futures.result()  #",
    ),
    "no rate_limit": ("04_rate_limiting", "rate_limit(LIMIT, occupy=count, strict=True)", "pass"),
    "strict=False": ("04_rate_limiting", "count, strict=True)", "count, strict=False)"),
    "no cache policy": (
        "05_caching",
        "cache_policy=INPUTS + CacheKeyFnPolicy(cache_key_fn=task_and_api)",
        "cache_policy=None",
    ),
    "INPUTS alone as the key": (
        "05_caching",
        " + CacheKeyFnPolicy(cache_key_fn=task_and_api)",
        "",
    ),
    "no API in the key": ("05_caching", 'f"{context.task.name} {api_url()}"', "context.task.name"),
    "expiration of a second": ("05_caching", "timedelta(days=1)", "timedelta(seconds=1)"),
    "pickle instead of JSON": (
        "05_caching",
        "JSONSerializer(object_decoder=None)",
        '"pickle"',
    ),
    "a redirect is not followed": (
        "06_star_chart",
        "follow_redirects=True",
        "follow_redirects=False",
    ),
    "the token goes to another host": (
        "06_star_chart",
        'event_hooks={"response": [bound]}',
        'event_hooks={"response": [bound], "request": [lambda r: r.headers.update(headers)]}',
    ),
}


def run(copy: Path, lesson: str) -> list[str]:
    """Run a lesson of the copy and its tests, with the copy's pipeline; return what failed."""
    notebooks = [f"notebooks/{lesson}.ipynb"] if lesson else ["notebooks"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-n2", "-rfE", "--tb=no", "-k", "not script"]
    done = subprocess.run(
        [*pytest, "tests/test_pipeline.py", *notebooks],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return re.findall(r"^(?:FAILED|ERROR) \S*?([^/]+?::.*?)(?: - |$)", done.stdout, re.M)


def main() -> int:
    words = sys.argv[1:] or [""]
    source = (ROOT / "pipeline.py").read_text()
    wrong = 0
    print("| Change | Caught by |\n|:--|:--|")
    for name, (lesson, old, new) in MUTANTS.items():
        if not any(word in name for word in words):
            continue
        if old not in source:
            sys.exit(f"{name}: {old!r} is not in pipeline.py any more")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "project")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            (copy / "pipeline.py").write_text(source.replace(old, new, 1))
            caught = run(copy, lesson)
        print(f"| {name} | {', '.join(caught) or 'nothing'} |", flush=True)
        wrong += bool(caught) == (name == "no change")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
