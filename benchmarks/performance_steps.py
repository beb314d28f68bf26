"""Whole optimizer steps in docs/performance.md and README, from benchmarks/results/conditions.json.

Left out: the measuring (`conditions.py`), and the rest of the page (`performance.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pages import paragraph, table
from performance_files import NOT_MEASURED, listed, read, spread

# How many conditions there are: `conditions.ALL`, which imports every contender.
CONDITIONS = 16
# Of the medians of processor time: what no condition may exceed, and what we would like.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "plain / TRL": (0.7, 0.5),
    "warm-up 0.02 / TRL": (0.9, 0.7),
    "warm-up 0.005 / TRL": (0.9, 0.7),
    "warm-up 0.02 / plain": (1.25, 1.1),
    "warm-up 0.005 / plain": (1.25, 1.1),
    "annealed / plain": (1.15, None),
    "plain / GKD": (None, None),
}
_CONTENDERS = ("plain", "warm-up 0.02", "warm-up 0.005", "TRL distillation", "TRL GKD")
_DTYPES, _LENGTHS = ("float32", "bf16"), ("fixed", "natural")


@dataclass(frozen=True)
class Bar:
    """A figure under every condition that was measured, and the bar that its worst one has to meet.

    Attributes:
        label: what is measured.
        values: of each condition, by its name.
        bar: the most that is allowed, or with `at_least` the least; None: nothing was asked.
        goal: what we would like.
        at_least: more is better.
    """

    label: str
    values: dict[str, float]
    bar: float | None
    goal: float | None = None
    at_least: bool = False

    @property
    def worst(self) -> str:
        """The name of the condition."""
        choose = min if self.at_least else max
        return choose(self.values, key=lambda name: self.values[name])

    @property
    def verdict(self) -> str:
        if self.bar is None or not self.values:
            return "-" if self.values else "not measured"
        value = self.values[self.worst]
        return "met" if (value >= self.bar if self.at_least else value <= self.bar) else "missed"

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        asked = ["-" if limit is None else f"{sign} {limit:g}" for limit in (self.bar, self.goal)]
        if not self.values:
            return [self.label, "-", "-", "-", *asked, self.verdict]
        ends = (f"{end(self.values.values()):.3f}" for end in (min, max))
        return [self.label, *ends, self.worst, *asked, self.verdict]


def conditions() -> dict[str, dict[str, Any]]:
    """What was measured, by name, in the order of the table; empty where nothing was."""
    record = read("conditions")
    found = record["conditions"] if record else {}

    def place(name: str) -> tuple[int, int, int, int]:
        cell = found[name]
        return _DTYPES.index(cell["dtype"]), _LENGTHS.index(cell["lengths"]), cell["prompt"], cell["tokens"]

    return {name: found[name] for name in sorted(found, key=place)}


def step_bars() -> list[Bar]:
    cells = conditions()
    return [
        Bar(label, {name: cell["ratios"][label]["median"] for name, cell in cells.items()}, *limits)
        for label, limits in LIMITS.items()
    ]


# ---- the section ----


def how_measured() -> str:
    cells = conditions()
    if not cells:
        return (
            f"{NOT_MEASURED}: `python benchmarks/conditions.py` measures {CONDITIONS} conditions, into "
            "`conditions.json`."
        )
    origins = [*read("conditions")["provenance"].values()]
    machines = [origin["machine"] for origin in origins]
    switches = [
        f"{name} {listed(origin.get(name) or 'not set' for origin in origins)}"
        for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    ]
    return paragraph(
        f"Measured: {len(cells)} of {CONDITIONS} conditions, {listed(cell['repeats'] for cell in cells.values())} "
        f"repetitions of each, batches of {listed(cell['rows'] for cell in cells.values())}, on "
        f"{listed(machine['cpu'] for machine in machines)} ({listed(machine['cores'] for machine in machines)} cores, "
        f"threads: {listed(origin['threads'] for origin in origins)}; instruction set "
        f"{listed(origin['instructions'] for origin in origins)}, {', '.join(switches)})."
    )


def _named(cell: dict[str, Any]) -> list[str]:
    return [cell["dtype"], cell["lengths"], f"{cell['prompt']}", f"{cell['tokens']}"]


_NAMES = ("dtype", "lengths", "prompt", "tokens")


def by_processor() -> str:
    rows = [
        [*_named(cell), f"{cell['seconds']['plain']['median']:.1f}"]
        + [spread(cell["ratios"][label]) for label in LIMITS]
        for cell in conditions().values()
    ]
    return table((*_NAMES, "plain step, s", *LIMITS), rows) if rows else f"{NOT_MEASURED}."


def by_clock() -> str:
    rows = [
        [*_named(cell), *(f"{cell['wall_ratios'][label]['median']:.2f}" for label in LIMITS)]
        for cell in conditions().values()
    ]
    return table((*_NAMES, *LIMITS), rows) if rows else f"{NOT_MEASURED}."


def parts() -> str:
    """Where the time of a step goes, under each condition that is the worst of a ratio with a bar."""
    cells = conditions()
    worst: dict[str, list[str]] = {}
    for bar in step_bars():
        if bar.values and bar.bar is not None:
            worst.setdefault(bar.worst, []).append(bar.label)
    found = []
    for name, labels in worst.items():
        found += [paragraph(f"**{name}**, the worst for {listed(labels)}:"), _parts(cells[name])]
    return "\n\n".join(found) or f"{NOT_MEASURED}."


def _parts(cell: dict[str, Any]) -> str:
    contenders = {name: cell["parts"][name] for name in _CONTENDERS}
    largest = {
        part: max(shares.get(part, 0.0) for shares in contenders.values())
        for shares in contenders.values()
        for part in shares
    }
    rows = [["whole step, s", *(f"{cell['seconds'][name]['median']:.1f}" for name in contenders)]]
    for part in sorted(largest, key=lambda part: -largest[part]):
        shares = (shares.get(part) for shares in contenders.values())
        rows.append([part, *("" if share is None else f"{share:.0%}" for share in shares)])
    return table(("share of processor time", *contenders), rows)


def floors() -> str:
    """What a warm-up step would take beside a plain one if what makes it dearer were away, one thing after another.

    Of fixed lengths, where both draw the same number of tokens.
    """
    rows = []
    for cell in conditions().values():
        if cell["lengths"] != "fixed":
            continue
        plain, warm = (
            {part: cell["seconds"][name]["median"] * share for part, share in cell["parts"][name].items()}
            for name in ("plain", "warm-up 0.02")
        )
        step, drafted = sum(plain.values()), warm["draft"] / plain["draft"]
        as_wide = sum(warm.values()) - warm["teacher"] + drafted * plain["teacher"]
        decided = step + warm["decide"] - plain["decide"]
        figures = (sum(warm.values()) / step, drafted, as_wide / step, decided / step)
        rows.append([*_named(cell), *(f"{figure:.2f}" for figure in figures)])
    columns = (
        "warm-up 0.02 / plain",
        "its drafting / plain's",
        "if its teacher took as long a token as in a plain step",
        "if besides it drafted no longer",
    )
    return table((*_NAMES, *columns), rows) if rows else f"{NOT_MEASURED}."


def limit() -> str:
    """What takes the time of a warm-up step where it is dearest beside a plain one."""
    (bar,) = [bar for bar in step_bars() if bar.label == "warm-up 0.02 / plain"]
    if not bar.values:
        return paragraph(f"**Whole steps.** {NOT_MEASURED}.", item=True)
    shares = conditions()[bar.worst]["parts"]["warm-up 0.02"]
    largest = sorted(shares, key=lambda part: -shares[part])[:4]
    said = ", ".join(f"{part} {shares[part]:.0%}" for part in largest)
    return paragraph(
        f"**Whole steps.** Where a warm-up step costs most beside a plain one ({bar.worst}), its time is {said}.",
        item=True,
    )


# ---- README ----


def step_row() -> str:
    start, end = "| **What a step costs** |", "[performance](docs/performance.md#a-whole-step)"
    cells, bars = conditions(), {bar.label: bar for bar in step_bars()}
    if not cells:
        return (
            f"{start} not measured since `bf16=True` holds in every pass | beside TRL's trainers, under {CONDITIONS} "
            f"conditions; {end} |"
        )

    def between(*labels: str) -> str:
        found = [value for label in labels for value in bars[label].values.values()]
        return f"{min(found):.2f} to {max(found):.2f}"

    verdicts = [bar.verdict for bar in bars.values() if bar.verdict in ("met", "missed")]
    of_all = f"all {CONDITIONS}" if len(cells) == CONDITIONS else f"{len(cells)} of {CONDITIONS}"
    verdict = f"of {len(verdicts)} bars that we set ourselves {verdicts.count('missed')} are missed"
    return (
        f"{start} a plain step takes {between('plain / TRL')} of TRL's `DistillationTrainer`, a warm-up step "
        f"{between('warm-up 0.02 / TRL', 'warm-up 0.005 / TRL')} of it and "
        f"{between('warm-up 0.02 / plain', 'warm-up 0.005 / plain')} of a plain one | the best and the worst of "
        f"{of_all} conditions, processor time, SmolLM2-135M and its copy of 8 layers; "
        f"{verdict} ([which, and where](docs/performance.md#the-bars)); "
        f"[conditions.json](benchmarks/results/conditions.json), {end} |"
    )


STEP_TABLES: dict[str, Callable[[], str]] = {
    "steps, how": how_measured,
    "steps": by_processor,
    "steps by the clock": by_clock,
    "parts of a step": parts,
    "floors of a step": floors,
    "limit of steps": limit,
}
