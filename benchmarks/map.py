"""When does blending help? Gains over plain distillation as one property of the setting changes at a time.

    python benchmarks/map.py run --panel all --seeds 8 --workers 2
    python benchmarks/map.py run --panel b --list              # what is missing, and how long it should take
    python benchmarks/map.py collect                           # benchmarks/results/map.json
    python benchmarks/map.py run --panel a --seeds 8 --onto benchmarks/results/map.json     # what is not in it
    python benchmarks/map.py collect --onto benchmarks/results/map.json     # where earlier runs are only there
    python benchmarks/map_figures.py                           # docs/figures/map-*.png

The setting is `zoo:staged`, with pairs by their knobs (benchmarks/map_pairs.py). Every run is one training by the
package's own trainer and samplers, scored on problems that no run trains on. A finished run is a file in runs/map/runs
and is not made again while its settings are the same; kill at any time. After a change in how pairs are taught, remove
runs/map. Seeds are paired: a seed decides prompts, their order and all noise. Other vector instructions of a processor
teach another pair, whose runs join no record but their own. What was expected is in docs/experiments.md.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where a spawned worker imports this file by its path

import torch
from map_pairs import Knobs, Pair, lost_lookups, ready, stage_rates
from map_record import as_text, joined, keys, pair_name
from map_step0 import InBox, measure_pair
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from trb.models.packaged import quiet_libraries
from trb.safety.files import write_json, write_text
from trb.studies import provenance
from trb.tasks.evaluation import evaluate
from trb.tasks.prompts import load_prompts
from trb.training.config import TRBConfig
from trb.training.trainer import TRBTrainer

ROOT = Path("runs/map")
CURVE = {"every": 15, "samples": 256, "seed": 1}
FINAL = {"samples": 1024, "seed": 2}
LEARNING_RATE = 1e-3
LOG_EVERY = 10  # of a run's log, what is kept in the record of all runs
GUESS = 25.0  # processor seconds of a run, where none was timed
LOGGED = (
    "loss",
    "reward",
    "reverse_kl",
    "support_mass",
    "kl_budget",
    "teacher_weight",
    "accept_rate",
    "teacher_log_prob",
)

METHODS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd"},
    "trb": {"method": "trb", "initial_kl_budget": 0.5, "blend_warmup_steps": 25},
    "trb-wide": {"method": "trb", "initial_kl_budget": 2.0, "blend_warmup_steps": 50},
    "fixed": {"method": "fixed", "initial_kl_budget": 0.5},
    "sft": {"method": "sft", "sft_warmup_steps": 15},
    "skd": {"method": "skd", "skd_teacher_top_k": 1, "skd_teacher_temperature": 1.0},
    "veto": {"method": "veto", "veto_strength": 0.4},
    # With their defaults: what sets itself is not tuned.
    "trb-sequence": {"method": "trb", "budget_schedule": "sequence"},
    "trb-sequence-linear": {"method": "trb", "budget_schedule": "sequence-linear"},
    "trb-gap": {"method": "trb", "budget_schedule": "gap"},
    "trb-sequence-linear-veto": {"method": "trb", "budget_schedule": "sequence-linear", "loss": "veto"},
    "trb-gap-veto": {"method": "trb", "budget_schedule": "gap", "loss": "veto"},
}
RIVALS = {
    "temperature": {"method": "temperature", "initial_temperature": 0.7, "temperature_warmup_steps": 25},
    "tropd": {"method": "tropd"},
    # As long as the default's warm-up, all of it from the teacher: what is left of a gain is not a budget's.
    "teacher-first": {"method": "opd", "behavior": "teacher_first", "sft_warmup_steps": 12},
    "eopd": {"method": "eopd", "forward_top_k": 0},
    **{name: {"method": name} for name in ("tip", "iw", "prefix")},
    "horizon": {"method": "horizon", "initial_horizon": 6},  # the default is longer than a solution
}
"""Only in panels that name them."""


@dataclass(frozen=True)
class Point:
    """A setting: the pair, and how it is trained."""

    knobs: Knobs = field(default_factory=Knobs)
    learning_rate: float = LEARNING_RATE
    loss_top_k: int = 0
    rollouts: int = 64
    steps: int = 60

    @property
    def name(self) -> str:
        k = self.knobs
        return (
            f"{k.stages}-stages-{k.start:g}-start-{k.shared:g}-shared-{k.teacher}"
            f"-{self.learning_rate:g}-rate-{self.loss_top_k}-top-{self.rollouts}-rollouts-{self.steps}-steps"
        )


@dataclass(frozen=True)
class Panel:
    """Points along one or two properties; `along` and `by` are names of fields of a point or its knobs."""

    title: str
    along: str
    by: str | None
    points: tuple[Point, ...]
    methods: tuple[str, ...] = tuple(METHODS)


def _points(**axes: Sequence[Any]) -> tuple[Point, ...]:
    """All combinations of values of fields of a point or of its knobs."""
    points = [Point()]
    for name, values in axes.items():
        points = [_with(point, name, value) for point in points for value in values]
    return tuple(points)


def _field(point: Point, name: str) -> Any:
    return getattr(point.knobs if hasattr(point.knobs, name) else point, name)


def _with(point: Point, name: str, value: Any) -> Point:
    if hasattr(point.knobs, name):
        return replace(point, knobs=replace(point.knobs, **{name: value}))
    return replace(point, **{name: value})


PANELS = {
    "a": Panel("stages and the student's start", "stages", "start", _points(stages=(4, 8, 12), start=(0.3, 0.45, 0.7))),
    "b": Panel("stages that share a table", "shared", None, _points(shared=(0.0, 0.5, 1.0))),
    "c": Panel(
        "learning rate",
        "learning_rate",
        "loss_top_k",
        _points(learning_rate=tuple(factor * LEARNING_RATE for factor in (1, 3, 8)), loss_top_k=(16, 0)),
    ),
    "d": Panel("rollouts of a step", "rollouts", None, _points(rollouts=(16, 64, 256))),
    "e": Panel(
        "what the teacher says after a wrong step",
        "start",
        "teacher",
        _points(start=(0.3, 0.45, 0.7), teacher=("gives-up", "unaware")),
    ),
    "f": Panel(
        "longer training",
        "steps",
        None,
        _points(steps=(60, 180)),
        ("opd", "trb-wide", "trb-gap", "veto", "temperature"),
    ),
    "g": Panel(
        "a budget, or just the teacher",
        "stages",
        None,
        _points(start=(0.3,), stages=(12, 16, 24)),
        ("trb-sequence-linear", "teacher-first"),
    ),
    "h": Panel(
        "the relatives",
        "start",
        None,
        _points(start=(0.3, 0.45)),
        ("opd", "veto", "trb-sequence-linear", "eopd", "tip", "iw", "prefix", "horizon"),
    ),
}


def _among(panel: Panel, values: Sequence[str]) -> tuple[Point, ...]:
    return tuple(point for point in panel.points if str(_field(point, panel.along)) in values)


@dataclass(frozen=True)
class Unit:
    """One run."""

    point: Point
    method: str
    seed: int

    def path(self, root: Path) -> Path:
        return root / "runs" / self.point.name / f"{self.method}-seed-{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, but for the code."""
        options = {"curve": CURVE, "final": FINAL, "seed": self.seed}
        return {"point": asdict(self.point), "method": (METHODS | RIVALS)[self.method], **options}

    def finished(self, root: Path) -> bool:
        path = self.path(root)
        # JSON has no tuples: compared as it is read back.
        return path.exists() and json.loads(path.read_text())["settings"] == json.loads(json.dumps(self.settings))


# ---- one run ----


class Curve(TrainerCallback):
    """Scores the student before training and every few steps."""

    def __init__(self, score: Any) -> None:
        self.score, self.points, self.seconds = score, [{"step": 0, "pass_at_1": score()}], 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % CURVE["every"] == 0 and state.global_step < state.max_steps:
            began = time.process_time()
            self.points.append({"step": state.global_step, "pass_at_1": self.score()})
            self.seconds += time.process_time() - began


def train(unit: Unit, pair: Pair) -> dict[str, Any]:
    """Train and score one student; what its file holds."""
    began = time.process_time()
    torch.set_num_threads(1)  # of every run: sums round differently with another number
    quiet_libraries()
    point, longest = unit.point, 3 * unit.point.knobs.stages + 6  # a solution has 3 tokens a stage and 3
    student, teacher = map(AutoModelForCausalLM.from_pretrained, (pair.student, pair.teacher))
    tokenizer, teacher_tokenizer = map(AutoTokenizer.from_pretrained, (pair.student, pair.teacher))
    score = partial(_pass_at_1, student, tokenizer, point.knobs, longest)
    prompts = point.rollouts // 4
    with tempfile.TemporaryDirectory() as scratch:
        args = TRBConfig(
            scratch,
            **(METHODS | RIVALS)[unit.method],
            seed=unit.seed,
            max_steps=point.steps,
            learning_rate=point.learning_rate,
            lr_scheduler_type="linear",
            loss_top_k=point.loss_top_k,
            per_device_train_batch_size=point.rollouts,
            gradient_accumulation_steps=1,
            num_generations=4,
            max_completion_length=longest,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            recorded_rollouts=0,
            disable_tqdm=True,
        )
        set_seed(unit.seed)
        curve = Curve(partial(score, **{key: CURVE[key] for key in ("samples", "seed")}))
        trainer = TRBTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=load_prompts(
                point.knobs.data, limit=_at_most(point.knobs, "train", prompts * point.steps), seed=unit.seed
            ),
            processing_class=tokenizer,
            teacher_processing_class=teacher_tokenizer,
            reward_fn=InBox.score,
            callbacks=[curve],
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        ready_at = time.process_time()
        trainer.train()
        trained = time.process_time()
        log = [row for row in trainer.state.log_history if "loss" in row]
    final = score(**FINAL)
    curve.points.append({"step": point.steps, "pass_at_1": score(**{key: CURVE[key] for key in ("samples", "seed")})})
    return {
        "settings": unit.settings,
        "final": final,
        "collapsed": collapsed(final, curve.points),
        "curve": curve.points,
        "stage_rates": stage_rates(student.eval(), tokenizer, point.knobs),
        "lost": lost_lookups(student, teacher.eval(), tokenizer, point.knobs),
        "log": {key: [_brief(row.get(key, row.get(f"trb/{key}"))) for row in log] for key in LOGGED},
        "processor_seconds": {
            "training": round(trained - ready_at - curve.seconds, 2),
            "all": round(time.process_time() - began, 2),
        },
        "provenance": provenance.describe(),
    }


def collapsed(final: float, curve: Sequence[Mapping[str, float]]) -> bool:
    """Whether a run lost more than half of the best score it had on its way, the untrained student's included."""
    return final < max(point["pass_at_1"] for point in curve) / 2


def _at_most(knobs: Knobs, split: str, wanted: int) -> int:
    """How many problems to draw: few stages have few."""
    tenths = 1 if split == "test" else 9
    return min(wanted, knobs.task.variety(knobs.stages) * tenths // 20)


def _pass_at_1(student: Any, tokenizer: Any, knobs: Knobs, longest: int, *, samples: int, seed: int) -> float:
    """The share of right answers among `samples` completions at temperature 1 of problems that no run trains on."""
    problems = load_prompts(knobs.data, split="test", limit=_at_most(knobs, "test", samples), seed=seed)
    each = max(1, samples // len(problems))
    options = {"max_new_tokens": longest, "seed": seed, "max_rows": 1024, "progress": False, "verifier": InBox}
    was_training = student.training
    result = evaluate(student.eval(), tokenizer, problems, n=each, **options)
    student.train(was_training)
    return result.pass_at_1


def _brief(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- many runs ----


def units_of(panels: Sequence[Panel], seeds: Sequence[int], methods: Sequence[str] | None) -> list[Unit]:
    """The runs of panels, each once; those of one seed stand together, so that an unfinished map is paired."""
    return list(
        dict.fromkeys(
            Unit(point, method, seed)
            for seed in seeds
            for panel in panels
            for point in panel.points
            for method in methods or panel.methods
        )
    )


def _unknown(units: Sequence[Unit], record: Mapping[str, Any]) -> list[Unit]:
    """The runs that a record lacks, or has of a method with other settings."""
    known = keys(record)
    return [
        unit
        for unit in units
        if (unit.point.name, unit.method, unit.seed) not in known
        or record["methods"][unit.method] != (METHODS | RIVALS)[unit.method]
    ]


def prepare(group: Sequence[Knobs], root: Path) -> None:
    """Make pairs that share models, and measure them."""
    torch.set_num_threads(1)
    quiet_libraries()
    for knobs in group:
        pair, path = ready(knobs, root / "pairs"), step0_path(knobs, root)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure_pair(knobs, pair) | {"provenance": provenance.describe()})


def step0_path(knobs: Knobs, root: Path) -> Path:
    return root / "step0" / f"{pair_name(asdict(knobs))}.json"


def work(unit: Unit, root: Path) -> None:
    """Make one run's file."""
    result = train(unit, ready(unit.point.knobs, root / "pairs"))
    path = unit.path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    gc.collect()


def make(units: Sequence[Unit], root: Path, workers: int) -> None:
    """Make the files that are missing; with one worker in this process."""
    left = [unit for unit in units if not unit.finished(root)]
    tables: dict[tuple, dict[Knobs, None]] = {}
    for unit in left:
        knobs = unit.point.knobs
        tables.setdefault((knobs.stages, knobs.shared), {})[knobs] = None
    # One thread a run, and idle threads that sleep: read when workers import torch.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console))
        pool = (
            None if workers == 1 else stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        )
        pairs = progress.add_task("pairs", total=len(tables))
        for _ in _done(pool, prepare, [list(group) for group in tables.values()], root):
            progress.advance(pairs)
        runs = progress.add_task("runs", total=len(units), completed=len(units) - len(left))
        for unit in _done(pool, work, left, root):
            progress.advance(runs)
            console.print(_summary(unit, root))


def _done(
    pool: Executor | None, job: Callable[[Any, Path], None], subjects: Sequence[Any], root: Path
) -> Iterator[Any]:
    """Subjects of a job, each once it is done."""
    if pool is None:
        for subject in subjects:
            job(subject, root)
            yield subject
        return
    running = {pool.submit(job, subject, root): subject for subject in subjects}
    try:
        for future in as_completed(running):
            future.result()
            yield running[future]
    finally:  # after an error or Ctrl-C: what has begun ends, and no more begins
        for future in running:
            future.cancel()


def _summary(unit: Unit, root: Path) -> str:
    result = json.loads(unit.path(root).read_text())
    curve = " ".join(f"{100 * point['pass_at_1']:.0f}" for point in result["curve"])
    seconds = result["processor_seconds"]["all"]
    return f"{unit.point.name} {unit.method} {unit.seed}: {100 * result['final']:.1f}% ({curve}), {seconds:.0f} s"


def show(units: Sequence[Unit], root: Path) -> None:
    """What is there, what is missing, and how long that should take by the runs that are there."""
    seconds: dict[str, list[float]] = {}
    for path in (root / "runs").rglob("*.json"):
        seconds.setdefault(path.name.rpartition("-seed-")[0], []).append(
            json.loads(path.read_text())["processor_seconds"]["all"]
        )
    known = [value for values in seconds.values() for value in values]
    left = [unit for unit in units if not unit.finished(root)]
    for unit in units:
        print("missing " if unit in left else "finished", unit.point.name, unit.method, unit.seed)
    usual = statistics.median(known) if known else GUESS
    total = sum(statistics.median(seconds.get(unit.method, [usual])) for unit in left)
    print(f"{len(left)} of {len(units)} runs are missing: about {total / 3600:.1f} processor hours, pairs not counted")


# ---- the record ----


def collect(root: Path) -> dict[str, Any]:
    """Everything to keep of the runs there are."""
    runs = [json.loads(path.read_text()) for path in sorted((root / "runs").rglob("*.json"))]
    origins = [entry.pop("provenance") for entry in runs]
    names = {
        Point(**{**point, "knobs": Knobs(**point["knobs"])}).name: point
        for point in (r["settings"]["point"] for r in runs)
    }
    methods = {json.dumps(options): name for name, options in (METHODS | RIVALS).items()}
    for entry in runs:
        point = entry["settings"]["point"]
        entry["point"] = Point(**{**point, "knobs": Knobs(**point["knobs"])}).name
        entry["method"] = methods.get(json.dumps(entry["settings"]["method"]), "?")
        entry["seed"] = entry["settings"]["seed"]
        entry["log"] = {key: values[::LOG_EVERY] for key, values in entry["log"].items()}
        del entry["settings"]
    return {
        "provenance": provenance.describe() | {"commits_of_the_runs": sorted({str(one["commit"]) for one in origins})},
        "curve": CURVE,
        "final": FINAL,
        "log_every": LOG_EVERY,
        "methods": METHODS | RIVALS,
        "points": names,
        "panels": {
            name: {"title": panel.title, "along": panel.along, "by": panel.by, "points": [p.name for p in panel.points]}
            for name, panel in PANELS.items()
        },
        "step0": {path.stem: json.loads(path.read_text()) for path in sorted((root / "step0").glob("*.json"))},
        "pairs": {
            path.parent.name: {
                key: json.loads(path.read_text())[key] for key in ("measured", "parameters", "processor_seconds")
            }
            for path in sorted((root / "pairs").glob("*/training.json"))
        },
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make the runs of a panel that are missing")
    runner.add_argument(
        "--panel",
        choices=(*PANELS, "all"),
        required=True,
        help="; ".join(f"{n}: {p.title}" for n, p in PANELS.items()) + "; all of them, seed after seed",
    )
    runner.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds 0 to N-1 (default 4)")
    runner.add_argument(
        "--methods", nargs="+", choices=METHODS | RIVALS, metavar="M", help="some only: " + ", ".join(METHODS | RIVALS)
    )
    runner.add_argument("--values", nargs="+", metavar="V", help="some values only of what the panel goes along")
    runner.add_argument("--workers", type=int, default=1, metavar="N", help="runs at once (default 1)")
    runner.add_argument("--onto", type=Path, metavar="FILE", help="a record whose runs need not be made again")
    runner.add_argument("--list", action="store_true", help="say what would be run, and stop")
    collector = commands.add_parser("collect", help="write what there is as one JSON file")
    collector.add_argument("--out", type=Path, default=Path("benchmarks/results/map.json"), metavar="FILE")
    collector.add_argument(
        "--onto", type=Path, metavar="FILE", help="a record whose runs stay; what was made again must be the same"
    )
    for command in (runner, collector):
        command.add_argument(
            "--root", type=Path, default=ROOT, metavar="DIR", help=f"where runs are kept (default {ROOT})"
        )
    options = parser.parse_args(argv)
    if options.command == "collect":
        record = collect(options.root)
        if options.onto:
            record = joined(record, json.loads(options.onto.read_text()))
        write_text(options.out, as_text(record))
        return
    panels = list(PANELS.values()) if options.panel == "all" else [PANELS[options.panel]]
    if options.values:
        panels = [replace(panel, points=_among(panel, options.values)) for panel in panels]
    units = units_of(panels, range(options.seeds), options.methods)
    if options.onto:
        units = _unknown(units, json.loads(options.onto.read_text()))
    if options.list:
        show(units, options.root)
    else:
        make(units, options.root, options.workers)


if __name__ == "__main__":
    main()
