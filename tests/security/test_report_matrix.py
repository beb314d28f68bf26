"""Every field and every key of what a run, a comparison, a study and a probe leave behind, made hostile one by one.

The fields are found by walking the files, so a field that is new tomorrow is attacked tomorrow. A page comes of it or
an error that names the file; what a browser makes of the pages is seen with all texts hostile at once.
"""

from __future__ import annotations

import copy
import csv
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from browser import CHROMIUM, chromium
from hostile_helpers import slow
from report_helpers import Page, study_record, write_outcomes, write_probe, write_study

from trb.cli import main
from trb.report import ReportError, export, probe, write_report
from trb.safety.untrusted import parse_yaml

TEXTS = [
    "</script><script>window.__pwned=1</script>",
    "<!--<script>",
    "]]></style><img src=x onerror=window.__pwned=1>",
    "\"'><svg/onload=window.__pwned=1>",
    "javascript:window.__pwned=1",
    "${window.__pwned=1}{{ 7 * 7 }}{% raw %}",
    "\u2028\u2029\u0000\u001b]0;x\u0007\u202ednab\u2066\ufeff",
    "\ud800 alone",
    "=HYPERLINK(\"http://x\")|`code`$x^2$\\input{/etc/passwd}",
]  # fmt: skip
ALL = " ".join(TEXTS)
ODD: list[Any] = [
    None, True, -1, 0.5, 10**400, -(10**400), float("nan"), float("inf"), [], {}, [[[]]], {"a": {"b": [None, {}]}},
    json.loads("[" * 200 + "]" * 200), ["x", 1], "1e3", "\ud800", "x" * 1_000_000,
]  # fmt: skip
RECIPE = {
    "student": "zoo:student", "teacher": "zoo:teacher", "train_data": "zoo:chains", "train_limit": 8,
    "max_prompt_length": 64, "max_steps": 2, "prompts_per_step": 2, "num_generations": 2,
    "per_device_train_batch_size": 4, "max_completion_length": 8, "gradient_checkpointing": False,
    "save_strategy": "no", "logging_steps": 1, "eval_data": "zoo:chains", "eval_limit": 4, "eval_every": 1,
    "methods": {"opd": {}, "trb": {"initial_kl_budget": 0.02, "blend_warmup_steps": 2}},
}  # fmt: skip

# Places of each file that are changed: of a fixed draw in `make test`, six times as many in `make hostile`.
MOST = pytest.mark.parametrize("most", [12, pytest.param(80, marks=slow)])

Step = str | int


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison and a run as two short trainings leave them, a study and a probe as the other tests of pages do."""
    folder = tmp_path_factory.mktemp("kinds")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert main(["compare", "--config", str(recipe), "--output-dir", str(folder / "comparison"), "--quiet"]) == 0
    for path in folder.rglob("model"):
        shutil.rmtree(path)
    for path in folder.rglob("checksums.json"):
        path.unlink()
    shutil.copytree(folder / "comparison" / "trb", folder / "run")
    changed = {"student": {"zoo-chains": [1, 0, 1, 0]}, "trb": {"zoo-chains": [0, 1, 1, 0]}}
    for name in ("run", "comparison"):
        shutil.rmtree(folder / name / "evaluations", ignore_errors=True)
        write_outcomes(folder / name, changed)
    write_study(folder / "study", study_record(("chains",), ("opd", "trb")))
    write_probe(folder / "probe")
    return {kind: folder / kind for kind in ("run", "comparison", "study", "probe")}


def content(path: Path) -> Any:
    text = path.read_text()
    if path.suffix == ".yaml":
        return parse_yaml(text)
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write(path: Path, value: Any) -> None:
    """As JSON, which is YAML; what json.loads takes and honest tools would not write stays as it is."""
    lines = value if path.suffix == ".jsonl" else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def places(value: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], bool]]:
    """Where a value or (True) a key can be put in; of a list the first entry stands for all of its keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key), True
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        shapes = {str(sorted(item) if isinstance(item, dict) else ""): k for k, item in reversed([*enumerate(value)])}
        for place in shapes.values():
            yield from places(value[place], (*path, place))
    if path:
        yield path, False


def put(value: Any, path: tuple[Step, ...], key: bool, new: Any) -> Any:
    value = copy.deepcopy(value)
    inside = value
    for step in path[:-1]:
        inside = inside[step]
    if key:
        inside[str(new)] = inside.pop(path[-1])
    else:
        inside[path[-1]] = new
    return value


def files(directory: Path) -> list[Path]:
    """One of each kind of file: the methods of a study and their seeds are all alike."""
    found: dict[str, Path] = {}
    for path in sorted(directory.rglob("*.*")):
        if path.suffix in (".json", ".jsonl", ".yaml") and path.stat().st_size:
            found.setdefault(path.name, path)
    return list(found.values())


def with_each(directory: Path, most: int, new: Callable[[int], list[Any]]) -> Iterator[tuple[str, Any]]:
    """Change places in turn, each to the values that `new` gives for its number; the files are put back.

    Of a file with more than `most` places, so many by a fixed draw: a configuration's and a study's are much alike.
    """
    number, draw = 0, random.Random(directory.name)
    for path in files(directory):
        before, value = path.read_bytes(), content(path)
        found = list(places(value))
        for where, key in found if len(found) <= most else draw.sample(found, most):
            for one in new(number):
                if not (key and not isinstance(one, str)):
                    write(path, put(value, where, key, one))
                    yield f"{path.name} {where} {'key ' * key}{one!r:.60}", path
            number += 1
        path.write_bytes(before)


class Tags(Page):
    """What `inert` looks at: elements and attributes, each closed in order."""

    def handle_data(self, data: str) -> None:
        pass


def inert(page: Page) -> None:
    assert len(page.all("script")) == 2 and not page.all("img") and not page.all("iframe")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = [attributes.get("href") or "" for _, attributes in page.tags if "href" in attributes]
    assert all(link.startswith("#") or link == "data:," for link in links)


def rendered(directory: Path, what: str) -> bool:
    """Whether there is a page; an error of another kind than the named one is the bug."""
    try:
        text = write_report(directory).read_text(encoding="utf-8")
    except ReportError:
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    inert(Tags(text))
    return True


@MOST
@pytest.mark.parametrize("kind", ["run", "study", "probe"])
def test_no_text_in_any_place_becomes_markup_or_a_traceback(
    kinds: dict[str, Path], kind: str, most: int, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(kinds[kind], tmp_path / kind))
    pages = [rendered(directory, what) for what, _ in with_each(directory, most, lambda number: [ALL])]
    assert len(pages) > 1.25 * most and sum(pages) > len(pages) / 3
    assert rendered(directory, "put back")


@MOST
@pytest.mark.parametrize("kind", ["run", "study", "probe"])
def test_no_odd_value_in_any_place_is_a_traceback(kinds: dict[str, Path], kind: str, most: int, tmp_path: Path) -> None:
    """Each place gets one of them, by a fixed draw."""
    directory = Path(shutil.copytree(kinds[kind], tmp_path / kind))
    draw = random.Random(kind)
    for what, _ in with_each(directory, most, lambda number: [draw.choice(ODD)]):
        rendered(directory, what)


@pytest.mark.parametrize("path", ["policies", "relative"])
@pytest.mark.parametrize("value", [True, 3, [[[]]], "trb"])
def test_a_probe_whose_policies_are_no_object_is_refused(kinds: dict[str, Path], path: str, value: Any) -> None:
    record = content(kinds["probe"] / "probe.json")
    record["continuation"]["truncations"][0][path] = value
    with pytest.raises(ReportError, match=f"{path} is .* expected an object"):
        probe.groups(record, "", "probe.json")


# ---- all at once ----


@pytest.fixture(scope="module")
def hostile(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind with `ALL` for each text, and for each key that an honest file does not need for its page."""
    return {kind: poisoned(path, tmp_path_factory.mktemp("hostile") / kind) for kind, path in kinds.items()}


def poisoned(source: Path, directory: Path) -> Path:
    shutil.copytree(source, directory)
    for path in sorted(directory.rglob("*.*")):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            write(path, with_texts(content(path), free=path.name in ("provenance.json", "config.yaml")))
    for extra in ("metrics.jsonl", "results.json"):
        for path in directory.rglob(extra):
            value = content(path)
            for record in value if isinstance(value, list) else [value]:
                record[ALL] = {"pass_at_1": 0.5, "interval": [0.4, 0.6]} if extra == "results.json" else 1.0
            write(path, value)
    return directory


def with_texts(value: Any, free: bool) -> Any:
    if isinstance(value, dict):
        more = {f"{ALL} {ALL}": ALL} if free else {}
        return {key: with_texts(item, free) for key, item in value.items()} | more
    if isinstance(value, list):
        return [with_texts(item, free) for item in value]
    return ALL if isinstance(value, str) else value


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed: the page cannot be used without one")
def test_pages_of_hostile_texts_run_and_ask_for_nothing(hostile: dict[str, Path], tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        for kind, directory in hostile.items():
            page = write_report(directory)
            tab = browser.open(page.as_uri())
            tab.evaluate("document.querySelectorAll('button:not([disabled])').forEach((button) => button.click())")
            tab.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            links = tab.evaluate("document.querySelectorAll('a[data-match]').length")
            assert links == {"run": 4, "comparison": 9}.get(kind, 0), kind
            tab.evaluate("document.querySelectorAll('a[data-match]').forEach((link) => link.click())")
            assert tab.evaluate("document.querySelectorAll('.as-text').length") == min(links, 1), kind
            if tab.evaluate("document.querySelectorAll('.tok').length"):
                tab.hover(".tok", 0)
            assert tab.evaluate("document.body.textContent").count("window.__pwned") > 3, kind
            assert tab.evaluate("typeof window.__pwned") == "undefined", kind
            assert tab.evaluate("document.querySelectorAll('script, img, iframe, object, embed').length") == 2, kind
            assert tab.complaints == [], kind
            assert {url.split("#")[0] for url in tab.requests} <= {page.as_uri(), "data:,"}, kind


def test_a_script_that_ran_would_be_noticed(tmp_path: Path) -> None:
    """The net itself: the canary, and what the browser complains of."""
    if CHROMIUM is None:
        pytest.skip("no chromium installed")
    page = tmp_path / "page.html"
    page.write_text(f"<body>{TEXTS[2]}<script>window.__pwned=1; nothing()</script>")
    with chromium(tmp_path / "profile") as browser:
        tab = browser.open(page.as_uri())
        assert tab.evaluate("window.__pwned") == 1 and tab.complaints
    with pytest.raises(AssertionError):
        inert(Page(f"<p>{TEXTS[2]}</p>"))


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # such names leave no room for a chart
@pytest.mark.parametrize("kind", [pytest.param("run", marks=slow), "comparison", "study", "probe"])
def test_tables_and_figures_of_hostile_texts_are_inert(hostile: dict[str, Path], kind: str, tmp_path: Path) -> None:
    paths = export(hostile[kind], tmp_path / "out")
    assert {path.suffix for path in paths} >= {".png", ".svg"} | ({".csv", ".tex", ".md"} if kind != "probe" else set())
    for path in paths:
        if path.suffix == ".png":
            continue
        assert path.resolve().parent.parent == (tmp_path / "out").resolve()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
            assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r", "-H"))]
        elif path.suffix == ".tex":
            assert "\\input" not in text and not re.search(r"(?<!\\)\$x", text)
        elif path.suffix == ".md":
            assert not re.search(r"(?<!\\)<(script|img|svg|!--)", text)
        else:
            tree = ElementTree.fromstring(text)
            tags = {element.tag.split("}")[-1] for element in tree.iter()}
            assert not tags & {"script", "image", "foreignObject", "a"}
            links = [value for element in tree.iter() for name, value in element.attrib.items() if "href" in name]
            assert all(value.startswith("#") for value in links)
