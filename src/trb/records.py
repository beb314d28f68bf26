"""The files that a run, a comparison, a study or a probe leaves: the name of each, its schema, and its version.

Whoever writes or reads one of them does so through its entry here, and nobody else spells its name. A schema says what
must be there and of which kind the rest is; fields that it does not list pass. Null stands where a number is not known,
infinite or NaN. A file that changes so that older readers would misread it gets a new version
(`trb.safety.typed_files`).

Left out on purpose: the options in config.yaml, recipe.yaml and study.yaml (`trb.studies.recipe`, `trb.studies.study`),
what transformers writes into checkpoints and models, and what the numbers mean (the modules that compute them).
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Self

from pydantic import Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from trb.safety.typed_files import JsonFile, LinesFile, RunFile, Schema, of_kind

# ---- what fields hold ----


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _is_level(value: Any) -> bool:
    return _is_number(value) and (value is None or 0 < value < 1 or not abs(value) < math.inf)


def _is_chance(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _is_number(value[1])


def _or_names(value: Any, read: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, list) else read(value)


def _or_one(value: Any, read: Callable[[Any], Any]) -> Any:
    return read([value] if isinstance(value, Mapping) else value)


Number = Annotated[Any, of_kind(_is_number, "a number or null")]
Known = Annotated[Any, of_kind(lambda value: type(value) in (int, float), "a number")]
Count = Annotated[Any, of_kind(lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")]
Flag = Annotated[Any, of_kind(lambda value: value in (None, True, False), "true or false")]
Share = Annotated[Any, of_kind(lambda value: type(value) is bool or _is_number(value), "a number, true or false")]
Text = Annotated[Any, of_kind(lambda value: isinstance(value, str | None), "text")]
Interval = Annotated[Any, of_kind(_is_interval, "[low, high] or null")]
Level = Annotated[Any, of_kind(_is_level, "a share between 0 and 1 such as 0.95")]
Chance = Annotated[Any, of_kind(_is_chance, "[text, probability]")]
Numbers = list[Number] | None
Options = dict[str, Any] | None


class Score(Schema):
    """pass@1 of a model on a problem set, or the mean over several (under `suites`)."""

    name: Text = None
    pass_at_1: Number = None
    interval: Interval = None
    n_problems: Number = None
    n_samples: Number = None
    mean_length: Number = None
    stop_rate: Number = None
    suites: Annotated[dict[str, "Score"] | None, WrapValidator(_or_names)] = None


class WholeScore(Score):
    """A score that others can be computed from: every number is there, unless nothing was measured."""

    pass_at_1: Number

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        numbers = (self.n_problems, self.n_samples, self.mean_length, self.stop_rate, *(self.interval or [None]))
        missing = self.interval is not None if self.pass_at_1 is None else None in numbers
        if missing:
            raise PydanticCustomError("kind", "expected a score with all of its numbers")
        return self


Scores = Annotated[list[WholeScore], Field(min_length=1)]


class RunScore(Score):
    """The score of a trained student."""

    steps: Number = None
    train_seconds: Number = None
    held_out: Options = None


class Results(Schema):
    """Scores by name, the student's and the teacher's among them; of `trb eval`, by problem set beside `model`."""

    __pydantic_extra__: dict[str, RunScore]
    student: Score | None = None
    teacher: Score | None = None
    model: Any = None
    provenance: Options = None


class Outcomes(WholeScore):
    """A score, and how many answers to each problem were right."""

    correct: list[Count]


class SplitScores(Schema):
    suites: dict[str, Outcomes]

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not self.suites:
            raise PydanticCustomError("kind", "expected at least one score in suites")
        return self


class ReferenceScores(Schema):
    dev: SplitScores
    test: SplitScores


class Configuration(Schema):
    """One configuration of a method, and its scores on the development problems."""

    configuration: Options = None
    score: Number = None
    pass_at_1: Number = None
    interval: Interval = None
    per_seed: Numbers = None
    seeds: Number = None
    selected: Flag = None


class Selection(Schema):
    select_by: Text = None
    seeds: list[Count] | None = None
    methods: dict[str, list[Configuration]]

    @model_validator(mode="after")
    def _has_chosen(self) -> Self:
        for name, rows in self.methods.items():
            if not any(row.selected for row in rows):
                raise PydanticCustomError("kind", "expected a selected configuration of {name}", {"name": name})
        return self


# ---- a study's findings; while it is young, most of this may be missing ----


class Difference(Schema):
    estimate: Number = None
    interval: Interval = None
    standard_error: Number = None
    p_value: Number = None
    p_value_holm: Number = None
    effect_size: Number = None


class Band(Schema):
    steps: Numbers = None
    mean: Numbers = None
    low: Numbers = None
    high: Numbers = None


class Target(Schema):
    target: Number = None
    median: Number = None
    reached: Number = None
    seeds: Number = None


class Average(Schema):
    pass_at_1: Number = None
    interval: Interval = None
    difference_to_opd: Difference | None = None
    best: Flag = None


class Method(Schema):
    label: Text = None
    configuration: Options = None
    seeds: Number = None
    problems: Number = None
    pass_at_1: Number = None
    interval: Interval = None
    per_seed: Numbers = None
    suites: dict[str, Number] | None = None
    difference_to_opd: Difference | None = None
    differences: dict[str, Difference | None] | None = None
    curve: Band | None = None
    area: Difference | None = None
    area_difference_to_opd: Difference | None = None
    steps_to_target: Target | None = None
    metrics: dict[str, Band | None] | None = None


Suites = Annotated[list[dict[str, Any]] | None, WrapValidator(_or_one)]


class Reference(Schema):
    pass_at_1: Number = None
    interval: Interval = None
    mean_length: Number = None
    stop_rate: Number = None


class Setting(Schema):
    title: Text = None
    description: Text = None
    dev: Suites = None
    test: Suites = None
    student: Reference | None = None
    teacher: Reference | None = None
    methods: dict[str, Method | None] | None = None
    sweep: dict[str, list[Configuration] | None] | None = None
    steps: Number = None


class Averages(Schema):
    methods: dict[str, Average | None] | None = None


class Probe(Schema):
    """Estimates are objects with `value` and `interval`, or numbers; `trb.report.probe` looks into them."""

    student: Any = None
    teacher: Any = None
    problems: dict[str, Number] | None = None
    samples: Number = None
    max_new_tokens: Number = None
    temperature: Number = None
    kl_budget: Number = None
    skd_teacher_temperature: Number = None
    seed: Number = None
    level: Level = None
    continuation: Any = None
    budgets: Any = None
    replacement: Any = None
    provenance: Any = None


class Findings(Schema):
    name: Text = None
    description: Text = None
    rule: Text = None
    level: Level = None
    seeds: Any = None
    settings: dict[str, Setting | None] | None = None
    average: Averages | None = None
    diagnostics: dict[str, Probe | None] | None = None
    provenance: Options = None


# ---- lines, each of an optimizer step ----


class Step(Schema):
    step: Count


class StepScore(Score):
    step: Count


class Rollout(Step):
    """One completion, with numbers per token; `policy` in the excerpts of a probe."""

    prompt: Text = None
    prompt_key: Text = None
    rollout_index: Number = None
    blended: bool | None = None
    policy: Text = None
    completion: Text = None
    tokens: list[str] | None = None
    reward: Number = None
    teacher_weight: Numbers = None
    kl_student: Numbers = None
    accepted: list[Share] | None = None
    student_log_prob: Numbers = None
    teacher_log_prob: Numbers = None
    kl_teacher: Numbers = None
    alternatives: list[dict[str, list[Chance]] | None] | None = None


class Skipped(Step):
    """A completion of a step that was not taken."""

    non_finite: list[str]
    process: Count
    micro_batch: Count
    prompt: str
    completion: str
    prompt_ids: list[Count]
    completion_ids: list[Count]
    reverse_kl: Numbers


class Problem(Schema):
    """One problem of an evaluation; the first line of the file has its settings instead."""

    settings: Options = None
    problem: Count = 0
    prompt_hash: Text = None
    n: Count = 0
    correct: Count = 0
    lengths: list[Count] | None = None
    stopped: list[bool] | None = None
    completions: list[str] | None = None


# ---- checkpoints ----


class Sealed(Schema):
    bytes: Count
    sha256: Text = None


class Checksums(Schema):
    files: dict[str, Sealed]
    sha256: str


class Reached(Schema):
    bytes: Count
    sha256: str


class Guarded(Schema):
    skipped: Count
    in_a_row: Count
    taken: Count
    left_out: Count


class Progress(Schema):
    """What a process has added up since the last log."""

    loss: Known
    total_loss: Known
    last_logged: Count
    metrics: dict[str, list[Any]]
    sums: dict[str, list[Known]]
    schedules: Options = None
    guard: Guarded


# ---- files ----

# Of a run or a comparison; a study and a probe have some of them too.
CONFIG = RunFile("config.yaml")
RECIPE = RunFile("recipe.yaml")
REPORT = RunFile("report.html")
PROVENANCE = JsonFile("provenance.json", schema=dict[str, Any])
RESULTS = JsonFile("results.json", schema=Results)
METRICS = LinesFile("metrics.jsonl", schema=Step)
HELD_OUT = LinesFile("held_out.jsonl", schema=Step)
EVALS = LinesFile("evals.jsonl", schema=StepScore)
ROLLOUTS = LinesFile("rollouts.jsonl", schema=Rollout)
MEASUREMENTS = (METRICS, HELD_OUT, EVALS, ROLLOUTS)
MEASURED = LinesFile("MEASUREMENT.jsonl", schema=Step)  # any of them: the step is what they have in common
EVALUATIONS, SKIPPED, MODEL, MODEL_PARTIAL = "evaluations", "skipped", "model", "model.partial"  # folders
SKIPPED_STEP = LinesFile("step-N.jsonl", (f"{SKIPPED}/step-*.jsonl",), schema=Skipped)
SCORES = JsonFile("ROLE.json", (f"{EVALUATIONS}/*.json",), schema=Scores)
CHECKSUMS = JsonFile("checksums.json", schema=Checksums)

# Of a study; its settings have folders of their names, and these have folders of runs (`trb.studies.study`).
STUDY_PLAN = RunFile("study.yaml")
STUDY = JsonFile("study.json", schema=Findings)
REFERENCE, PROBE_FOLDER, SCORING = "reference", "probe", "scoring"  # folders
REFERENCE_SCORES = JsonFile("ROLE.json", (f"{REFERENCE}/*.json",), schema=ReferenceScores)
SELECTION = JsonFile("selection.json", schema=Selection)
TEST = JsonFile("test.json", schema=SplitScores)
SECONDS = JsonFile("seconds.json", schema=Known)
_LINES = (f"{EVALUATIONS}/*.jsonl", f"{EVALUATIONS}/*/*.jsonl", f"{SCORING}/*.jsonl")
PROBLEMS = LinesFile("SUITE.jsonl", _LINES, schema=Problem)

# Of a probe.
PROBE = JsonFile("probe.json", schema=Probe)
PARTS = "parts"  # a folder
PROBE_SETTINGS = JsonFile("settings.json", (f"{PARTS}/settings.json",), schema=dict[str, Any])
PART = JsonFile("PART.json", (f"{PARTS}/*.json",), compact=True)

# Of a checkpoint, beside what transformers saves there.
CHECKPOINT_PREFIX, CHECKPOINT_PARTIAL = "checkpoint-", "checkpoint.partial"  # folders
TRAINER_STATE = RunFile("trainer_state.json")
RUN = JsonFile("trb_run.json", schema=dict[str, Any])
REACH = JsonFile("trb_records.json", schema=dict[str, Reached])
PROGRESS = JsonFile("trb_state_RANK.json", ("trb_state_*.json",), schema=Progress, compact=True)

CARD = RunFile("README.md")  # which TRL writes when it saves a checkpoint
DAMAGED = RunFile("NAME.damaged", ("*.damaged",))
OWN = (
    *(CONFIG, RECIPE, REPORT, PROVENANCE, RESULTS, *MEASUREMENTS, SKIPPED_STEP, SCORES, CHECKSUMS),
    *(STUDY_PLAN, STUDY, REFERENCE_SCORES, SELECTION, TEST, SECONDS, PROBLEMS),
    *(PROBE, PROBE_SETTINGS, PART, RUN, REACH, PROGRESS, CARD, DAMAGED),
)
RUN_MARKS = (CONFIG, RECIPE, METRICS, RESULTS)  # show that a folder is that of a run or a comparison
SAVED = RunFile("what transformers saves", (f"{MODEL}/*", f"{CHECKPOINT_PREFIX}*/*"))


def step_name(step: int) -> str:
    """What the files and folders of an optimizer step are called."""
    return f"step-{step:06d}"


def named_step(path: PurePath) -> int | None:
    """The optimizer step in a name that `step_name` has made, None for another name."""
    prefix, _, number = path.stem.partition("-")
    return int(number) if prefix == "step" and number.isdecimal() else None


def role_name(role: str) -> str:
    """`SCORES` or `REFERENCE_SCORES` of the student or the teacher."""
    return f"{role}.json"


def problems_name(suite: str) -> str:
    """`PROBLEMS` of a problem set, which may have any name."""
    return f"{_slug(suite, r'A-Za-z0-9._-').strip('-.')[:100] or 'eval'}.jsonl"


def part_name(name: str) -> str:
    """`PART` of that name."""
    return f"{_slug(name, r'A-Za-z0-9.=').strip('-')}.json"


def progress_name(process: int) -> str:
    """`PROGRESS` of one process."""
    return f"trb_state_{process}.json"


def _slug(name: str, kept: str) -> str:
    return re.sub(f"[^{kept}]+", "-", name)


def aside(path: Path) -> Path:
    """Where a damaged file is moved to."""
    return path.with_name(f"{path.name}.damaged")


def owner(path: PurePath) -> RunFile | None:
    """What a file inside an output directory is, by its name and those of its folders; None if it is none of these."""
    return next((file for file in (*OWN, SAVED) if file.claims(path)), None)
