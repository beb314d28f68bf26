"""The numbers of a study or a comparison as tables: Markdown, CSV and LaTeX, and what the page shows.

Markdown and LaTeX show rounded numbers with their intervals, the best of a column in bold; CSV has one column per
number, in full precision. "Best" is the highest mean, of a reverse KL the lowest, and claims nothing: the differences
have their own table. Every caption says what the intervals are and over how many seeds.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trb.measures import PASS_AT_1, PER_TOKEN, REVERSE_KL, Measure, Scored
from trb.records import RESULTS, STUDY, Difference, Method, Target
from trb.report import summary
from trb.report.panels import capitalised, slug
from trb.report.reading import ReportError, Score, parse_scores, read, read_json
from trb.report.study import BASELINE, Setting, Study, parse_study, read_study
from trb.report.style import MINUS, Format, label, show, show_range, visible

Value = float | str | None

PER_TOKEN_TITLES = {"student_entropy": "Entropy", "teacher_log_prob": "Teacher log-probability"}


@dataclass(frozen=True)
class Cell:
    """One entry: text as it is, or a number with its format and interval."""

    value: Value
    format: Format = "number"
    interval: tuple[float, float] | None = None
    best: bool = False

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else show(self.value, self.format)

    @property
    def range(self) -> str:
        return show_range(self.interval, self.format)


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row. `name` is a file name without its ending."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def write_tables(source: str | Path | Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Write every table of `source` into `directory` as NAME.md, NAME.csv and NAME.tex; returns the paths.

    `source` is a study, comparison or run directory, a study.json or results.json, or the contents of one.
    Raises ReportError if it is none of these or malformed.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables_of(source):
        for ending, render in (("md", to_markdown), ("csv", to_csv), ("tex", to_latex)):
            path = folder / f"{table.name}.{ending}"
            path.write_text(render(table), encoding="utf-8", errors="replace", newline="")
            paths.append(path)
    return paths


def tables_of(source: str | Path | Mapping[str, Any]) -> list[Table]:
    """The tables of a source as `write_tables` takes it; those without a row are left out."""
    if isinstance(source, Mapping):
        return _tables_of_record(source, Path("."), "the given object")
    path = Path(source)
    if path.is_dir():
        if (path / STUDY).is_file():
            return study_tables(read_study(path))
        return score_tables(read(path).scores)
    if not path.is_file():
        raise ReportError(f"{path} does not exist. Give a study or comparison directory, {STUDY} or {RESULTS}.")
    return _tables_of_record(read_json(path), path.parent, str(path))


def _tables_of_record(record: Mapping[str, Any], directory: Path, where: str) -> list[Table]:
    if "settings" in record:
        return study_tables(parse_study(record, directory, where))
    scores = parse_scores(record, where)
    if not scores:
        raise ReportError(f"{where} holds neither settings ({STUDY}) nor scores ({RESULTS}).")
    return score_tables(scores)


# ---- which tables ----


def study_tables(study: Study) -> list[Table]:
    """Results and differences over all settings; then, per setting, suites, learning speed, sweep and all pairs."""
    found = [results_table(study), differences_table(study)]
    for setting in study.settings:
        found += [
            suites_table(study, setting),
            described_table(setting),
            learning_table(study, setting),
            sweep_table(study, setting),
            pairs_table(study, setting),
        ]
    return [table for table in found if table.rows]


def score_tables(scores: Mapping[str, Score]) -> list[Table]:
    """The one table of a comparison: the scores of results.json."""
    measure = next((score.measure for score in scores.values()), PASS_AT_1)
    best = measure.best(score.value for name, score in scores.items() if name not in ("student", "teacher"))
    more = () if measure is PASS_AT_1 else PER_TOKEN
    rows = tuple(
        (
            Cell({"student": "Student, before", "teacher": "Teacher"}.get(name, label(name))),
            _score(score, best if name not in ("student", "teacher") else None),
            *(Cell(getattr(score, key)) for key in more),
            Cell(score.n_problems, "count"),
            Cell(score.n_samples, "count"),
            Cell(score.mean_length),
            Cell(score.stop_rate, "percent"),
        )
        for name, score in scores.items()
    )
    caption = (
        f"{capitalised(measure.title)}{_in_nats(measure)} with 95% intervals over the problems and samples of one "
        "evaluation; 1 training seed per method."
    )
    header = ("Model", capitalised(measure.title), *(PER_TOKEN_TITLES[key] for key in more))
    return [Table("scores", caption, (*header, "Problems", "Samples", "Mean length", "Stop rate"), rows)]


def results_table(study: Study) -> Table:
    """The score of every method in every setting, and on average."""
    columns: list[Mapping[str, Scored]] = [setting.found.methods for setting in study.settings]
    columns += [study.average] if study.average else []
    names = [name for name in study.labels if any(name in column for column in columns)]
    best = [_best(column.values()) for column in columns]

    def row(title: str, scores: Sequence[Scored | None], bold: bool) -> tuple[Cell, ...]:
        cells = (_score(one, top if bold else None) for one, top in zip(scores, best, strict=True))
        return (Cell(title), *cells)

    def reference(title: str, scores: Sequence[Scored | None]) -> list[tuple[Cell, ...]]:
        known = any(score and score.value is not None for score in scores)
        return [row(title, [*scores, *[None] * bool(study.average)], False)] if known else []

    rows = [
        *reference("Student, before", [setting.found.student for setting in study.settings]),
        *(row(study.labels[name], [column.get(name) for column in columns], True) for name in names),
        *reference("Teacher", [setting.found.teacher for setting in study.settings]),
    ]
    header = ("Method", *(setting.title for setting in study.settings), *(["Average"] if study.average else []))
    caption = (
        f"{capitalised(study.titles)} on the test problems{_in_nats(*study.measures)}; {study.interval_name}s over "
        f"{seeds_and_problems(study.settings)} (student and "
        "teacher: over problems)."
    )
    return Table("results", caption, header, tuple(rows) if names else ())


def differences_table(study: Study) -> Table:
    """Every method minus plain distillation, setting by setting and on average."""
    rows = []
    for setting in study.settings:
        rows += [
            (
                Cell(setting.title),
                Cell(study.labels[name]),
                *_difference_cells(method.difference_to_opd, setting.measure),
                _points(method.area_difference_to_opd, setting.measure),
            )
            for name, method in setting.found.methods.items()
            if method.difference_to_opd
        ]
    rows += [
        (
            Cell("Average"),
            Cell(study.labels[name]),
            *_difference_cells(entry.difference_to_opd, study.measures[0]),
            Cell(None),
        )
        for name, entry in study.average.items()
        if entry.difference_to_opd
    ]
    baseline = study.labels.get(BASELINE, label(BASELINE))
    caption = (
        f"Difference to {baseline} in {_in(study)}; {study.interval_name}s over "
        f"{seeds_and_problems(study.settings)}, paired by seed and problem. p: two-sided; Holm: corrected for the "
        "comparisons of a setting; d: Cohen's d over seeds; area: difference of the areas under the development curves."
    )
    header = ("Setting", "Method", f"Difference to {baseline}", "p", "p (Holm)", "d", "Area")
    return Table("differences", caption, header, tuple(rows))


def suites_table(study: Study, setting: Setting) -> Table:
    """Scores by problem set, for a setting with several."""
    methods = setting.found.methods
    by_method = {name: method.suites for name, method in methods.items() if method.suites}
    suites = list(dict.fromkeys(suite for scores in by_method.values() for suite in scores))
    measure = setting.measure
    best = {suite: measure.best(scores.get(suite) for scores in by_method.values()) for suite in suites}
    rows = tuple(
        (
            Cell(study.labels[name]),
            *(Cell(v := scores.get(s), measure.format, best=v is not None and v == best[s]) for s in suites),
            _score(methods[name], None),
        )
        for name, scores in by_method.items()
    )
    sizes = {str(suite.get("name")): suite.get("problems") for suite in setting.found.test or ()}
    header = ("Method", *(f"{s} ({sizes[s]} problems)" if sizes.get(s) else s for s in suites), "Mean")
    caption = f"{setting.title}: {measure.title} by problem set, means over {seeds_of(methods.values())}."
    return Table(f"suites-{slug(setting.name)}", caption, header, rows if len(suites) > 1 else ())


def learning_table(study: Study, setting: Setting) -> Table:
    """How fast each method learned, on the development problems."""
    methods = setting.found.methods
    rows = tuple(
        (
            Cell(study.labels[name]),
            Cell(area.estimate, setting.measure.format, area.interval),
            _points(method.area_difference_to_opd, setting.measure),
            Cell(target.median, "count"),
            Cell(_reached(target)),
        )
        for name, method in methods.items()
        for area, target in [(method.area or Difference(), method.steps_to_target or Target())]
        if area.estimate is not None or method.steps_to_target
    )
    targets = [method.steps_to_target for method in methods.values() if method.steps_to_target]
    goals = {one.target for one in targets if one.target is not None}
    goal = f"{show(min(goals), setting.measure.format)}" if len(goals) == 1 else "the target"
    caption = (
        f"{setting.title}: mean {setting.measure.title} over training (area under the development curve) with "
        f"{study.interval_name}s, and the median step at which {goal} was first reached; {seeds_of(methods.values())}."
        f"{uneven_steps(methods.values())}"
    )
    header = ("Method", "Area", "Difference to OPD", f"Steps to {goal}", "Seeds that reached it")
    return Table(f"learning-{slug(setting.name)}", caption, header, rows)


def sweep_table(study: Study, setting: Setting) -> Table:
    """Every configuration that was tried, with its development score."""
    rows = tuple(
        (
            Cell(study.labels.get(name) or label(name)),
            Cell(configuration_text(entry.configuration)),
            _score(entry, None),
            Cell(entry.seeds, "count"),
            Cell("selected" if entry.selected else ""),
        )
        for name, entries in setting.found.sweep.items()
        for entry in entries
    )
    over = spanned(entry.seeds for entries in setting.found.sweep.values() for entry in entries)
    title = setting.measure.title
    caption = f"{setting.title}: {title} on the development problems of every configuration, means over {over}."
    header = ("Method", "Configuration", capitalised(title), "Seeds", "Selected")
    return Table(f"sweep-{slug(setting.name)}", caption, header, rows)


def pairs_table(study: Study, setting: Setting) -> Table:
    """Every method minus every other."""
    methods = setting.found.methods
    names = [name for name, method in methods.items() if method.differences]
    rows = tuple(
        (
            Cell(study.labels[first]),
            *(_points(methods[first].differences.get(second), setting.measure) for second in names),
        )
        for first in names
    )
    caption = (
        f"{setting.title}: method of the row minus method of the column in {setting.measure.differences}; "
        f"{study.interval_name}s over {seeds_of(methods.values())}, paired by seed and problem, not corrected for "
        "their number."
    )
    header = ("Method", *(study.labels[name] for name in names))
    return Table(f"pairs-{slug(setting.name)}", caption, header, rows if len(names) > 1 else ())


def configuration_text(configuration: Mapping[str, Any] | None) -> str:
    """ "key = value" pairs in one line; secrets hidden."""
    return ", ".join(f"{key} = {value}" for key, value in summary.flatten(configuration or {})) or "defaults"


def seeds_of(methods: Iterable[Method]) -> str:
    """ "20 seeds", or "3 to 20 seeds" where methods differ."""
    return spanned(method.seeds for method in methods)


def uneven_steps(methods: Iterable[Method]) -> str:
    """A sentence, after a space, where the seeds of a method took different numbers of steps; else empty."""
    steps = sorted({step for method in methods for step in method.steps_per_seed or ()})
    if not steps:
        return ""
    return f" Seeds took {_span(steps)} steps; curves and areas cover those that all seeds have."


def spanned(seeds: Iterable[int | None]) -> str:
    """ "20 seeds", "3 to 20 seeds", or a confession."""
    counts = sorted({count for count in seeds if count})
    return f"{_span(counts)} seed{'' if counts == [1] else 's'}" if counts else "an unknown number of seeds"


def seeds_and_problems(settings: Sequence[Setting]) -> str:
    """ "20 seeds and 4,096 problems", with ranges where settings or methods differ."""
    methods = [method for setting in settings for method in setting.found.methods.values()]
    problems = sorted({int(method.problems) for method in methods if method.problems})
    return seeds_of(methods) + (f" and {_span(problems)} problems" if problems else "")


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"


def described_table(setting: Setting) -> Table:
    """What else is said of models that nothing can score."""
    found = {"Student, before": setting.found.student, **setting.found.methods, "Teacher": setting.found.teacher}
    rows = tuple(
        (
            Cell(label(name)),
            *(Cell(getattr(one, key)) for key in PER_TOKEN),
            Cell(one.mean_length),
            Cell(None if one.stop_rate is None else 1 - one.stop_rate, "percent"),
        )
        for name, one in found.items()
        if one is not None and one.student_entropy is not None
    )
    header = ("Model", *PER_TOKEN_TITLES.values(), "Mean length", "Cut")
    caption = (
        f"{setting.title}: the models' own completions of the test prompts; means over tokens in nats, tokens per "
        f"completion, and the share that was cut at the longest length; {seeds_of(setting.found.methods.values())}."
    )
    return Table(f"described-{slug(setting.name)}", caption, header, rows)


def _best(scores: Iterable[Scored]) -> float | None:
    known = [score for score in scores if score.value is not None]
    return known[0].measure.best(score.value for score in known) if known else None


def _score(score: Scored | None, best: float | None) -> Cell:
    if score is None:
        return Cell(None)
    return Cell(score.value, score.measure.format, score.interval, best=best is not None and score.value == best)


def _points(difference: Difference | None, measure: Measure) -> Cell:
    if difference is None:
        return Cell(None)
    return Cell(difference.estimate, measure.difference_format, difference.interval)


def _in(study: Study) -> str:
    return " or ".join(measure.differences for measure in study.measures)


def _in_nats(*measures: Measure) -> str:
    return ", in nats per token" if REVERSE_KL in measures else ""


def _difference_cells(difference: Difference | None, measure: Measure) -> tuple[Cell, ...]:
    found = difference or Difference()
    return (
        _points(found, measure),
        Cell(found.p_value, "p"),
        Cell(found.p_value_holm, "p"),
        Cell(found.effect_size, "effect"),
    )


def _reached(target: Target) -> str:
    return "–" if target.reached is None else f"{show(target.reached, 'count')} of {show(target.seeds, 'count')}"


# ---- as text ----


def _text_columns(table: Table) -> list[bool]:
    """Which columns hold text, and so are aligned to the left."""
    return [any(isinstance(row[i].value, str) for row in table.rows) for i in range(len(table.header))]


def to_markdown(table: Table) -> str:
    """A pipe table with its caption above."""
    lines = [_markdown(table.caption), ""]
    lines.append(_pipes(map(_markdown, table.header)))
    lines.append(_pipes("---" if is_text else "---:" for is_text in _text_columns(table)))
    lines += [_pipes(map(_markdown_cell, row)) for row in table.rows]
    return "\n".join(lines) + "\n"


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = _markdown(cell.text)
    return (f"**{text}**" if cell.best else text) + (f" ({cell.range})" if cell.range else "")


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", _one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_csv(table: Table) -> str:
    """Comma-separated values after RFC 4180: numbers in full, an interval as two further columns."""
    intervals = [any(row[i].interval for row in table.rows) for i in range(len(table.header))]
    stream = io.StringIO()
    writer = csv.writer(stream)
    header: list[str] = []
    for title, has_interval in zip(table.header, intervals, strict=True):
        header += [title, f"{title}, low", f"{title}, high"] if has_interval else [title]
    writer.writerow(map(_csv_text, header))
    for row in table.rows:
        line: list[Value] = []
        for cell, has_interval in zip(row, intervals, strict=True):
            line += [_csv_text(cell.value), *((cell.interval or (None, None)) if has_interval else ())]
        writer.writerow(line)
    return stream.getvalue()


# What begins a formula, also in the full-width forms that some spreadsheets take for it. A semicolon ends a cell where
# the decimal sign is a comma, and quotes inside a cell do not keep it from doing so.
_FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@＝＋－＠])")


def _csv_text(value: Value) -> Value:
    """Text without control characters, and with an apostrophe before what a spreadsheet would run as a formula."""
    return _FORMULA.sub(r"\1\2'", visible(value)) if isinstance(value, str) else value


def to_latex(table: Table) -> str:
    """A table environment for the booktabs package."""
    columns = "".join("l" if is_text else "r" for is_text in _text_columns(table))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [_latex_row(map(_latex, table.header)), r"\midrule"]
    lines += [_latex_row(map(_latex_cell, row)) for row in table.rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Iterable[str]) -> str:
    # A row that begins with [ would be read as the length after the line end before it.
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (rf" {{\scriptsize ({_latex(cell.range)})}}" if cell.range else "")


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "ε": r"$\varepsilon$",
    "μ": r"$\mu$",
    "β": r"$\beta$",
    "‖": r"$\|$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "∞": r"$\infty$",
    MINUS: "$-$",
    "–": "--",
    "\N{NO-BREAK SPACE}": "~",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    """Text without line ends and other control characters; no-break spaces stay."""
    return visible(re.sub(r"([^\S\xa0]|[\x00-\x1f\x7f])+", " ", text))
