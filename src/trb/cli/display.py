"""What the commands show: tables, progress bars, and text without control characters.

Nothing a model wrote is ever printed, and what others named (files, keys, methods) only as
`trb.safety.untrusted.printable` lets it through, and never as markup.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trb.safety.untrusted import printable

if TYPE_CHECKING:
    from rich.console import Console

    from trb.measures import Measure
    from trb.studies.listener import Listener
    from trb.studies.study import Study
    from trb.studies.sweep import StudyListener


_PER_TOKEN = {"student_entropy": "entropy", "teacher_log_prob": "log-prob"}


def message(error: Exception) -> str:
    """What an error says, without its number, and what was added to it on its way here."""
    said = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return " ".join([said, *getattr(error, "__notes__", ())])


def new_console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            """Rich ends the process here; how commands end is decided in one place (`trb.cli.main`)."""
            raise BrokenPipeError

    return Plain(stderr=stderr)


def print_paths(**paths: Path) -> None:
    """Where everything is, a line each; never wrapped, so that it can be copied."""
    for label, path in paths.items():
        line = f"{label}: {printable(str(path), lines=False)}"
        new_console().print(line, markup=False, highlight=False, soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    """Sentences, each from the start of a line."""
    for line in lines:
        new_console().print(printable(line, lines=False), markup=False, highlight=False)


def score_table(results: Mapping[str, Any], *, gain: bool = True) -> Any:
    """Student before, each method, teacher: pass@1 in percent or the reverse KL in nats per token, with its 95%
    interval, and the gain."""
    from rich.table import Table

    from trb.measures import PASS_AT_1, PER_TOKEN, measure_of

    names = {"student": "student before", "teacher": "teacher"}
    scores = {name: score for name, score in results.items() if name != "provenance"}
    measure = next((measure_of(score) for score in scores.values()), PASS_AT_1)
    more = () if measure is PASS_AT_1 else PER_TOKEN
    layout = {} if measure is PASS_AT_1 else _narrow()
    table = Table(caption=_caption(measure), caption_justify="left", **layout)
    change = "gain" if measure.higher_is_better else "change"
    named = ("", measure.heading, "95% interval", *([change] if gain else []))
    for heading in (*named, *(_PER_TOKEN[key] for key in more), "tokens", "stop %"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    start = results.get("student", {}).get(measure.key)
    for name, score in scores.items():
        value, interval = score.get(measure.key), score.get("interval")
        is_method = name not in names and value is not None and start is not None
        cells = [
            _number(value, measure),
            "" if interval is None else " to ".join(_number(end, measure) for end in interval),
            *([_number(value - start, measure, "+") if is_method else ""] if gain else []),
            *("" if score.get(key) is None else f"{score[key]:z.3f}" for key in more),
            f"{score['mean_length']:.0f}" if "mean_length" in score else "",
            _percent(score.get("stop_rate")),
        ]
        table.add_row(_cell(names.get(name, name)), *cells)
    return table


def result_table(results: Mapping[str, Any]) -> Any:
    """Scores where there are any, and where nothing was evaluated the loss at both ends of each run."""
    from trb.measures import measure_of

    runs = {name: score for name, score in results.items() if name not in ("provenance", "student", "teacher")}
    if any(score.get(measure_of(score).key) is not None for score in runs.values()):
        return score_table(results)
    from rich.table import Table

    table = Table(caption="the teacher's reverse KL, in nats per token; no eval_data, so no scores")
    for heading in ("", "loss of", "first step", "last step", "steps"):
        table.add_column(heading, justify="left" if heading in ("", "loss of") else "right", no_wrap=True)
    for name, score in runs.items():
        for key, text in (("training", "rollouts"), ("held_out", "held-out prompts")):
            if ends := score.get(key):
                losses = (
                    "" if ends[end]["loss"] is None else f"{ends[end]['loss']:.4f}" for end in ("before", "after")
                )
                table.add_row(_cell(name), text, *losses, str(score["steps"]))
    return table


def _cell(text: str) -> Any:
    """Text of others for a table, where a plain string would be read as markup."""
    from rich.text import Text

    return Text(printable(text, lines=False))


def print_plan(study: "Study") -> None:
    """What a study is about to run."""
    from rich.table import Table

    table = Table("method", "configurations", "keys", title=_cell(study.name), title_justify="left")
    for method in study.methods:
        every = [study.choices(setting)[method] for setting in study.settings]
        keys = ", ".join(dict.fromkeys(key for entries in every for entry in entries for key in entry))
        counts = " / ".join(dict.fromkeys(str(len(entries)) for entries in every))
        table.add_row(_cell(method), counts, _cell(keys or "nothing to choose"))
    console = new_console()
    console.print(table)
    select, test = len(study.units("select")), len(study.methods) * len(study.settings) * len(study.seeds.test)
    console.print(
        f"settings: {', '.join(study.settings)}\nselection: {select} runs ({len(study.seeds.select)} seeds, by the "
        f"{study.select_by} development score)\ntest: {test} runs ({len(study.seeds.test)} paired seeds)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def study_table(setting: Mapping[str, Any]) -> Any:
    """Per method: its score with its interval, and the paired difference to plain distillation: pass@1 in percent and
    points, or the reverse KL in nats per token."""
    from rich.table import Table

    from trb.measures import MEASURES, PASS_AT_1

    methods = setting["methods"]
    first = next(iter(methods.values()), {"seeds": 0, "problems": 0})
    title = f"{setting['title']}: {first['seeds']} paired seeds, {first['problems']} test problems"
    measure = MEASURES[setting.get("measure", PASS_AT_1.key)]
    shared: dict[str, Any] = {"caption": _caption(measure), "caption_justify": "left", **_narrow()}
    table = Table(title=_cell(title), title_justify="left", **shared)
    for heading in ("", measure.heading, "95% interval", "minus opd", "95% interval", "p (Holm)"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in ("student", "teacher"):
        low, high = (_number(end, measure) for end in setting[name]["interval"])
        table.add_row(name, _number(setting[name][measure.key], measure), f"{low} to {high}", "", "", "")
    for name, score in methods.items():
        difference, (low, high) = score["difference_to_opd"], (_number(end, measure) for end in score["interval"])
        cells = ["", "", ""]
        if difference is not None:
            low_high = " to ".join(_number(end, measure, "+", 1) for end in difference["interval"])
            estimate = _number(difference["estimate"], measure, "+", 1)
            cells = [estimate, low_high, f"{difference['p_value_holm']:.3f}"]
        table.add_row(_cell(name), _number(score[measure.key], measure), f"{low} to {high}", *cells)
    return table


def _narrow() -> dict[str, Any]:
    """Without lines between their columns wide tables fit into the 80 of a terminal, where cells would be cut."""
    from rich.box import SIMPLE_HEAD

    return {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}


def _caption(measure: "Measure") -> str | None:
    text = "reverse KL to the teacher, in nats per token of the model's own completions; less is better"
    return None if measure.format == "percent" else text


def _number(value: float | None, measure: "Measure", sign: str = "", more: int = 0) -> str:
    """A score as a column of its measure has it, or with more digits."""
    from trb.measures import decimals

    digits = (1 if measure.format == "percent" else 3) + more
    return "" if value is None else decimals(measure.scale * value, digits, sign)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:z.1f}"


def print_keys() -> None:
    """Every key of a recipe with its type, default and help."""
    from trb.studies.key_list import describe_keys

    for title, entries in describe_keys().items():
        print(f"\n{title}\n")
        for key, kind, default, text in entries:
            print(textwrap.fill(f"{key}  ({kind}; {default})", 100, initial_indent="  ", subsequent_indent="    "))
            print(textwrap.fill(text, 100, initial_indent="      ", subsequent_indent="      "))


@contextmanager
def listening(quiet: bool) -> Iterator["Listener"]:
    """A display on standard error: live bars on a terminal, a line now and then elsewhere, nothing when quiet."""
    from trb.studies.listener import Listener

    console = new_console(stderr=True)
    if quiet or int(os.environ.get("RANK", "0")):
        yield Listener()
    elif console.is_terminal:
        with live_display(console) as listener:
            yield listener
    else:
        yield _lines_display(console)


@contextmanager
def following(quiet: bool) -> Iterator["StudyListener"]:
    """A display of a whole study on standard error: one bar per phase on a terminal, a line per run elsewhere."""
    from rich.markup import escape
    from rich.progress import Progress

    from trb.studies.sweep import StudyListener

    console = new_console(stderr=True)

    class Bars(StudyListener):
        def __init__(self, progress: Progress) -> None:
            self.progress, self.name, self.done, self.total = progress, "", 0, 0
            self.task: Any = None

        def stage(self, text: str) -> None:
            console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

        def phase(self, name: str, done: int, total: int) -> None:
            self.name, self.done, self.total = name, done, total
            self.task = self.progress.add_task(escape(printable(f"{name} runs")), completed=done, total=total)

        def finished(self, job: str, seconds: float) -> None:
            self.done += 1
            self.progress.advance(self.task)
            if not console.is_terminal:
                self.stage(f"{self.name} {self.done} of {self.total}: {job}, {seconds:.0f} s")

    if quiet:
        yield StudyListener()
        return
    with Progress(*_columns(), console=console, disable=not console.is_terminal) as progress:
        yield Bars(progress)


def _columns() -> list[Any]:
    """What every bar shows: what, how far, since when and how long still."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]


def _numbers(logs: Mapping[str, Any]) -> str:
    """Loss, reward and budget, as far as they are known."""
    shown = (("loss", "loss", "z.3f"), ("reward", "trb/reward", "z.2f"), ("budget", "trb/kl_budget", ".3g"))
    return "  ".join(f"{label} {logs[key]:{form}}" for label, key, form in shown if logs.get(key) is not None)


@contextmanager
def live_display(console: "Console") -> Iterator["Listener"]:
    from rich.markup import escape
    from rich.progress import Progress, TextColumn

    from trb.studies.listener import Listener

    class Live(Listener):
        def __init__(self, progress: Progress) -> None:
            self.progress = progress
            self.steps: dict[str, int] = {}
            self.done: list[str] = []
            self.current = ""
            self.whole = progress.add_task("", total=None, numbers="", visible=False)
            self.task = progress.add_task("starting", total=None, numbers="")

        def plan(self, runs: Mapping[str, int]) -> None:
            self.steps = dict(runs)
            if len(runs) > 1:
                total = sum(runs.values()) if all(runs.values()) else None
                self.progress.update(self.whole, total=total, visible=True)
                self._show_whole(0)

        def stage(self, text: str) -> None:
            self.progress.update(self.task, description=escape(printable(text)), numbers="")

        def run(self, name: str, done: int, steps: int) -> None:
            self.current = name
            self.steps[name] = steps
            description = escape(printable(f"{name}: training", lines=False))
            self.progress.update(self.task, description=description, total=steps, completed=done)
            self._show_whole(done)

        def step(self, step: int, logs: Mapping[str, Any]) -> None:
            self.progress.update(self.task, completed=step, numbers=_numbers(logs))
            self._show_whole(step)

        def finished(self, name: str) -> None:
            self.done.append(name)
            self._show_whole(0)

        def kept(self, name: str) -> None:
            self.finished(name)
            _say_kept(console, name)

        def _show_whole(self, step: int) -> None:
            completed = sum(self.steps.get(name, 0) for name in self.done) + step
            description = f"methods {len(self.done)} of {len(self.steps)}"
            self.progress.update(self.whole, description=description, completed=completed)

    with Progress(*_columns(), TextColumn("{task.fields[numbers]}"), console=console, transient=True) as progress:
        yield Live(progress)


def _lines_display(console: "Console") -> "Listener":
    from trb.studies.listener import Listener

    class Lines(Listener):
        name, steps = "", 0

        def stage(self, text: str) -> None:
            console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

        def run(self, name: str, done: int, steps: int) -> None:
            self.name, self.steps = name, steps

        def step(self, step: int, logs: Mapping[str, Any]) -> None:
            if step == self.steps or step % max(1, self.steps // 10) == 0:
                self.stage(f"{self.name}: step {step} of {self.steps}  {_numbers(logs)}")

        def kept(self, name: str) -> None:
            _say_kept(console, name)

    return Lines()


def _say_kept(console: "Console", name: str) -> None:
    text = f"{printable(name, lines=False)}: already finished, nothing done"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
