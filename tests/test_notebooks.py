"""The lessons keep their shape. Whether their outputs are still right is nbval's to say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute import METADATA, cell_metadata, pictures
from nbclient import NotebookClient
from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
PAGES += (ROOT / "notebooks").glob("*.md")
SET_UP = "import lesson\n\ngithub = lesson.start()"
HEADINGS = ["Set-up", "What just happened?", "Your turn", "Summary", "Going deeper"]
# What a lesson may do without; 0 is the tour.
OPTIONAL = {n: {"What just happened?"} for n in range(10)}
OPTIONAL[0] = {"What just happened?", "Your turn", "Summary", "Going deeper"}
TAGS = {"exercise", "check", "nbval-ignore-output", "nbval-skip", "raises-exception"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def lesson(request):
    return request.param, nbformat.read(request.param, as_version=4)


def number(path):
    return int(path.stem[:2])


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def prose(notebook):
    return "\n\n".join(cell.source for cell in cells(notebook, "markdown"))


def python(cell):
    """A code cell's Python, without the lines that are IPython's."""
    return re.sub(r"^[!%].*", "", cell.source, flags=re.M)


def tags(cell):
    return set(cell.metadata.get("tags", []))


def core_and_deeper(notebook):
    """The cells before the heading *Going deeper*, and those after it."""
    starts = [cell.source.startswith("## Going deeper") for cell in notebook.cells]
    end = starts.index(True) if any(starts) else len(starts)
    return notebook.cells[:end], notebook.cells[end + 1 :]


def pieces(notebook):
    """The cells of each `###` of *Going deeper*, by its heading."""
    found = {}
    for cell in core_and_deeper(notebook)[1]:
        if cell.cell_type == "markdown" and (heading := re.match(r"### (.+)", cell.source)):
            here = found[heading[1]] = []
        here.append(cell)
    return found


def test_there_are_lessons():
    numbers = [number(path) for path in PATHS]
    assert numbers == list(range(10))


def test_is_valid_with_neutral_metadata(lesson):
    _, notebook = lesson
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata == METADATA
    for cell in notebook.cells:
        assert cell.metadata == cell_metadata(cell), cell.source
        assert all(tag in TAGS or re.fullmatch(r"readme-\w+", tag) for tag in tags(cell))


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
    n = number(path)
    first = notebook.cells[0].source
    assert re.match(rf"# {n} · \S", first)
    assert "**You will see**" in first
    assert len(re.findall(r"^- ", first, re.M)) == 3
    assert cells(notebook, "code")[0].source == SET_UP
    found = re.findall(r"^## (.+)", prose(notebook), re.M)
    wanted = [heading for heading in HEADINGS if heading in found]
    assert [heading for heading in found if heading in HEADINGS] == wanted
    missing = set(HEADINGS) - set(found) - OPTIONAL[n]
    assert not missing
    if "Summary" in found:
        summary = prose(notebook).partition("## Summary")[2].partition("## Going deeper")[0]
        assert f"| {n} · " in summary
    code = cells(notebook, "code")
    if n == 0:
        assert len(code) <= 16
        assert not any("exercise" in tags(cell) for cell in code)
    else:
        assert "<details><summary>Solution</summary>" in prose(notebook)


def test_going_deeper_comes_in_pieces(lesson):
    _, notebook = lesson
    _, deeper = core_and_deeper(notebook)
    if deeper:
        assert deeper[0].source.startswith("### ")
        headings = re.findall(r"^##+ .+", "\n".join(cell.source for cell in deeper), re.M)
        assert headings == [f"### {heading}" for heading in pieces(notebook)]


def minutes(part, n):
    """For somebody who reads each word, runs each cell, takes each guess and does the exercise."""
    text = "\n".join(cell.source for cell in part if cell.cell_type == "markdown")
    text = re.sub(r"<details>.*?</details>|```.*?```", " ", text, flags=re.S)
    code = [cell for cell in part if cell.cell_type == "code"]
    exercises = sum("exercise" in tags(cell) for cell in code)
    reading = len(text.split()) / 180 + len(re.findall(r"\*\*Guess", text)) / 3
    return reading + len(code) / 2 + exercises * {9: 15}.get(n, 6)


def test_it_takes_as_long_as_it_says(lesson):
    path, notebook = lesson
    first = notebook.cells[0].source
    core, deeper = core_and_deeper(notebook)
    for part, says in (core, r"\*\*It takes\*\*\D+(\d+) min"), (deeper, r"deeper\W+(\d+) .*more"):
        if part:
            (stated,) = re.findall(says, first, re.S)
            takes = minutes(part, number(path))
            assert abs(int(stated) - takes) < 1, f"says {stated} minutes and takes {takes:.1f}"


def test_the_readme_says_how_long_the_lessons_take():
    readme = PAGES[0].read_text(encoding="utf-8")
    says = dict(re.findall(r"^\| \[.*?\]\(notebooks/(.*?)\) \| (\d+) \|", readme, re.M))
    stated = {}
    for path in PATHS:
        first = nbformat.read(path, as_version=4).cells[0].source
        minutes = re.findall(r"(?:\*\*It takes\*\*\D+|and some )(\d+) (?:min|more for)", first)
        stated[path.name] = str(sum(map(int, minutes)))
    assert says == stated
    assert f"| {sum(map(int, says.values()))} |" in readme


def text_of(cell):
    """What a cell printed, as nbval compares it: charts and HTML left out."""
    outputs = cell.get("outputs", [])
    text = "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    rules = (ROOT / "tests" / "sanitize.cfg").read_text(encoding="utf-8")
    for regex, replace in get_sanitize_patterns(rules):
        text = re.sub(regex, replace, text)
    return text


@pytest.mark.slow
def test_each_piece_of_going_deeper_needs_only_the_set_up(practice_api, lesson):
    """In one kernel, which forgets between the pieces; a reader's is new."""
    path, notebook = lesson
    again = f"%reset_selective -f ^[^_]\n{SET_UP}\ngithub.reset()\nlesson.clear_cache()"
    untold = {"tags": ["nbval-ignore-output"]}
    alone = nbformat.v4.new_notebook()
    for piece in pieces(notebook).values():
        alone.cells += [nbformat.v4.new_code_cell(again, metadata=untold), *piece]
    if not alone.cells:
        pytest.skip("has no pieces")
    stored = [text_of(cell) for cell in alone.cells]
    options = {"timeout": 180, "coalesce_streams": True, "skip_cells_with_tag": "nbval-skip"}
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(alone, kernel_name="python3", resources=resources, **options).execute()
    for cell, text in zip(alone.cells, stored, strict=True):
        if not tags(cell):
            assert text_of(cell) == text, f"another output than after the core: {cell.source}"


def links(path, text):
    """The targets of all links. Files must be there."""
    targets = re.findall(r"\]\(([^)]+)\)", text)
    for target in targets:
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target
    return targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_a_page_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)", text, re.M)
    anchors = ["#" + re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in headings]
    within = [target for target in links(path, text) if target.startswith("#")]
    assert set(within) <= set(anchors)


def test_links_lead_somewhere(lesson):
    path, notebook = lesson
    targets = links(path, prose(notebook))
    here = PATHS.index(path)
    neighbours = {other.name for other in PATHS[max(0, here - 1) : here + 2]} - {path.name}
    assert neighbours <= set(targets)


def test_code_is_short_and_prose_is_in_markdown(lesson):
    _, notebook = lesson
    for cell in cells(notebook, "code"):
        # The reader's own flow, as it stands, or a file.
        whole = re.search(r"def my_stars\(|%%writefile", cell.source)
        assert len(cell.source.splitlines()) <= 16 or whole, cell.source
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


def test_every_picture_is_shown_and_described():
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    charts = {}
    for path in PATHS:
        notebook = nbformat.read(path, as_version=4)
        texts.append(prose(notebook))
        charts |= pictures(notebook)
    picture = r"!\[([^\]]*)\]\((?:notebooks/)?pictures/([^)]+)\)"
    shown = [match for text in texts for match in re.findall(picture, text)]
    files = {path.name: path.read_bytes() for path in (ROOT / "notebooks" / "pictures").iterdir()}
    assert {name for _, name in shown} == set(files)
    assert not [name for alt, name in shown if len(alt) <= 20]
    assert not [name for name, data in files.items() if len(data) > 150_000]
    assert charts.items() <= files.items()


def test_every_chart_has_an_alternative_text(lesson):
    _, notebook = lesson
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20, cell.source


def test_the_readme_has_the_words_of_its_board():
    import gauntlet

    (path,) = (path for path in PATHS if number(path) == 8)
    shown = [
        output.metadata["image/png"]["alt"]
        for cell in nbformat.read(path, as_version=4).cells
        if "readme-boards" in tags(cell)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    readme = PAGES[0].read_text(encoding="utf-8")
    alt = re.search(r"!\[([^\]]+)\]\(notebooks/pictures/boards.png\)", readme)[1]
    assert alt.startswith(f"{shown[0]}. ")
    assert alt.endswith(": " + ", ".join(gauntlet.ROUNDS))
