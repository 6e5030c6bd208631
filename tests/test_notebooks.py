"""The lessons keep their shape. Whether their outputs are still right is nbval's to say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute import METADATA, pictures

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ["Set-up", "What just happened?", "A trap worth knowing", "Your turn", "Summary"]
TAGS = {"exercise", "check", "nbval-ignore-output", "nbval-skip", "raises-exception"}
TAGS |= {"readme-mapping", "readme-stars"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def lesson(request):
    return request.param, nbformat.read(request.param, as_version=4)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def python(cell):
    """A code cell's Python, without the lines that are IPython's."""
    return re.sub(r"^[!%].*", "", cell.source, flags=re.M)


def tags(cell):
    return set(cell.metadata.get("tags", []))


def test_there_are_lessons():
    assert [path.stem[:2] for path in PATHS] == [f"{n:02}" for n in range(1, len(PATHS) + 1)]


def test_is_valid_with_neutral_metadata(lesson):
    _, notebook = lesson
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata == METADATA
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.source
        assert tags(cell) <= TAGS, cell.source


def test_was_executed_from_top_to_bottom(lesson):
    _, notebook = lesson
    executed = [c for c in cells(notebook, "code") if "nbval-skip" not in tags(c)]
    counts = [cell.execution_count for cell in executed]
    assert None not in counts
    assert counts == sorted(set(counts))
    assert counts[0] == 1


def test_has_no_error_and_no_warning_in_its_outputs(lesson):
    _, notebook = lesson
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in tags(cell), cell.source
            assert output.get("name") != "stderr", output.text


def test_what_is_not_compared_is_checked_by_the_next_cell(lesson):
    _, notebook = lesson
    code = cells(notebook, "code")
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if "nbval-ignore-output" in tags(cell):
            assert following is not None, cell.source
            assert not tags(following), cell.source
            assert following.outputs, following.source


def test_has_the_shape_of_a_lesson(lesson):
    path, notebook = lesson
    number = int(path.stem[:2])
    prose = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    assert re.match(rf"# {number} · \S", notebook.cells[0].source)
    assert "**You will see**" in notebook.cells[0].source
    assert len(re.findall(r"^- ", notebook.cells[0].source, re.M)) == 3
    found = re.findall(r"^## (.+)", prose, re.M)
    wanted = [heading for heading in HEADINGS if heading in found]
    assert [heading for heading in found if heading in HEADINGS] == wanted
    missing = set(HEADINGS) - set(found)
    assert missing <= ({"What just happened?"} if number in (6, 8) else set())
    assert cells(notebook, "code")[0].source == "import lesson\n\ngithub = lesson.start()"
    assert f"| {number} · " in prose.partition("## Summary")[2]
    assert "<details><summary>Solution</summary>" in prose


def test_links_lead_somewhere(lesson):
    path, notebook = lesson
    targets = re.findall(
        r"\]\(([^)]+)\)", "\n".join(cell.source for cell in cells(notebook, "markdown"))
    )
    for target in targets:
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target
    names = [other.name for other in PATHS]
    number = names.index(path.name)
    assert set(names[max(0, number - 1) : number + 2]) - {path.name} <= set(targets)


def test_code_is_short_and_prose_is_in_markdown(lesson):
    _, notebook = lesson
    for cell in cells(notebook, "code"):
        assert len(cell.source.splitlines()) <= 16, cell.source
        assert not re.search(r";\s*(\n|$)", cell.source), cell.source
        if "nbval-skip" not in tags(cell):
            ast.parse(python(cell))
            comments = [line for line in cell.source.splitlines() if line.lstrip().startswith("#")]
            assert not comments, cell.source


def test_ruff_has_nothing_to_say():
    for command in (["check"], ["format", "--check"]):
        ruff = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ruff.returncode == 0, ruff.stdout + ruff.stderr


def test_the_pictures_of_the_readme_are_charts_of_the_lessons():
    charts = {}
    for path in PATHS:
        charts |= pictures(nbformat.read(path, as_version=4))
    folder = ROOT / "notebooks" / "pictures"
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    # cost.png is drawn by tests/benchmark.py --chart, which takes a quarter of an hour.
    assert charts == {name: chart for name, chart in found.items() if name != "cost.png"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"!\[.{20,}?\]\(notebooks/pictures/(.*?)\)", readme)) == sorted(found)


def test_every_chart_has_an_alternative_text(lesson):
    _, notebook = lesson
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20, cell.source


def test_the_board_of_the_readme_is_that_of_the_last_lesson():
    cells = nbformat.read(PATHS[-1], as_version=4).cells
    [board] = [cell for cell in cells if 'board["verdict"] for name' in cell.source]
    html = board.outputs[-1]["data"]["text/html"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"<th>(\w[^<]+)</th>" + r"\s*<td>([^<]+)</td>" * 4, html)
    assert len(rows) > 10
    for promise, first, usual, _, finished in rows:
        assert f"| {promise} | {first} | {usual} | {finished} |" in readme
