"""The files that a run, a comparison, a study or a probe leaves: the name of each, its schema, and its version.

Whoever writes or reads one of them does so through its entry here, and nobody else spells its name. A schema says what
must be there and of which kind the rest is; fields that it does not list pass. Null stands where a number is not known,
infinite or NaN. A file that changes so that older readers would misread it gets a new version
(`trb.safety.typed_files`).

Left out on purpose: the options in config.yaml, recipe.yaml and study.yaml (`trb.studies.recipe`, `trb.studies.study`),
what transformers writes into checkpoints and models, and what the numbers mean (the modules that compute them).
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from trb.measures import MEASURES, PASS_AT_1, Outcomes, RunScore, Score, Scored, Scores
from trb.safety.fields import (
    Chance,
    Count,
    Flag,
    Interval,
    Known,
    Level,
    Named,
    Number,
    Numbers,
    Options,
    Share,
    Text,
    Whole,
    of_kind,
)
from trb.safety.typed_files import JsonFile, LinesFile, RunFile, Schema


def _or_value(value: Any) -> Any:
    return {"value": value} if type(value) in (int, float) else value


def _or_one(value: Any, read: Callable[[Any], Any]) -> Any:
    return read([value] if isinstance(value, Mapping) else value)


class Results(Schema):
    """Scores by name, the student's and the teacher's among them; of `trb eval`, by problem set beside `model`."""

    __pydantic_extra__: dict[str, RunScore]
    student: Score | None = None
    teacher: Score | None = None
    model: Any = None
    provenance: Options = None


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


class Configuration(Scored):
    """One configuration of a method, and its scores on the development problems."""

    configuration: Options = None
    score: Number = None
    per_seed: Numbers = None
    seeds: Whole = None
    selected: Flag = None


class Selection(Schema):
    select_by: Text = ""
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
    """First minus second in what is measured; effect size is Cohen's d over seeds, Holm's p corrected for the
    comparisons."""

    estimate: Number = None
    interval: Interval = None
    standard_error: Number = None
    p_value: Number = None
    p_value_holm: Number = None
    effect_size: Number = None


class Band(Schema):
    """A quantity over training steps: the mean over seeds and the ends of its interval, parallel to `steps`."""

    steps: list[Count] | None = None
    mean: Numbers = None
    low: Numbers = None
    high: Numbers = None

    @model_validator(mode="after")
    def _is_parallel(self) -> Self:
        steps = len(self.steps or ())
        if any(len(column) != steps for column in (self.mean, self.low, self.high) if column):
            raise PydanticCustomError("kind", "expected a number for each of its {steps} steps", {"steps": steps})
        return self


class Target(Schema):
    """When seeds first reached `target`: the median step (null where most never did), and how many did."""

    target: Number = None
    median: Number = None
    reached: Number = None
    seeds: Number = None


class Average(Scored):
    difference_to_opd: Difference | None = None
    best: Flag = None


class Method(Scored):
    """`student_entropy` and what follows it: of models that nothing can score, means over seeds. `steps_per_seed` is
    there where they differ; curve and area then cover the steps that all seeds have."""

    label: Text = ""
    configuration: Options = None
    seeds: Whole = None
    problems: Number = None
    steps_per_seed: list[Count] | None = None
    per_seed: Numbers = None
    suites: dict[str, Number] | None = None
    difference_to_opd: Difference | None = None
    differences: Named[Difference]
    curve: Band | None = None
    area: Difference | None = None
    area_difference_to_opd: Difference | None = None
    steps_to_target: Target | None = None
    metrics: Named[Band]
    student_entropy: Number = None
    teacher_log_prob: Number = None
    mean_length: Number = None
    stop_rate: Number = None


Measured = Annotated[str, of_kind(lambda key: key in MEASURES, " or ".join(MEASURES))]
Suites = Annotated[list[dict[str, Any]] | None, WrapValidator(_or_one)]


class Reference(Scored):
    student_entropy: Number = None
    teacher_log_prob: Number = None
    mean_length: Number = None
    stop_rate: Number = None


class Setting(Schema):
    title: Text = ""
    description: Text = ""
    measure: Measured = PASS_AT_1.key
    dev: Suites = None
    test: Suites = None
    student: Reference | None = None
    teacher: Reference | None = None
    methods: Named[Method]
    sweep: Named[list[Configuration]]
    steps: Whole = None


class Averages(Schema):
    methods: Named[Average]


class Estimate(Schema):
    value: Number = None
    interval: Interval = None
    standard_error: Number = None
    p_value: Number = None
    problems: Number = None


Estimated = Annotated[Estimate | None, BeforeValidator(_or_value)]


class Continued(Schema):
    """Rollouts of a policy, cut and gone on with: the share that had ended before, and success by who went on."""

    ended: Estimated = None
    success: Named[Estimated]


class Truncation(Schema):
    length: Number = None
    policies: Named[Continued]
    relative: Named[dict[str, Estimated]]
    difference: Named[dict[str, Estimated]]


class Continuation(Schema):
    reference: Text = ""
    rollouts: Any = None
    truncations: list[Truncation] | None = None


class Advised(Schema):
    blend: bool | None = None
    gain: Number = None
    error: Number = None
    sentences: list[Text] = Field(default_factory=list)


class Probe(Schema):
    """Estimates are objects with `value` and `interval`, or numbers."""

    student: Any = None
    teacher: Any = None
    problems: Named[Number]
    samples: Number = None
    max_new_tokens: Number = None
    temperature: Number = None
    kl_budget: Number = None
    skd_teacher_temperature: Number = None
    seed: Number = None
    level: Level = None
    continuation: Continuation | None = None
    budgets: list[dict[str, Estimated]] | None = None
    replacement: list[dict[str, Estimated]] | None = None
    outlook: Any = None
    advice: Advised | None = None
    provenance: Any = None


class Findings(Schema):
    name: Text = ""
    description: Text = ""
    rule: Text = ""
    level: Level = None
    seeds: Any = None
    settings: Named[Setting]
    average: Averages | None = None
    diagnostics: Named[Probe]
    provenance: Options = None


# ---- lines, each of an optimizer step ----


class Step(Schema):
    step: Count


class StepScore(Score):
    step: Count


class Rollout(Step):
    """One completion with numbers per token, null in answers of tools; `policy` is of the excerpts of a probe."""

    prompt: Text = ""
    teacher_prompt: Text = ""
    prompt_key: Text = ""
    rollout_index: Number = None
    blended: bool | None = None
    policy: Text = ""
    completion: Text = ""
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
    """A completion of a step that was not taken; with tools, `own` is 1 at the tokens that have a `reverse_kl`."""

    non_finite: list[str]
    process: Count
    micro_batch: Count
    prompt: str
    teacher_prompt: Text = ""
    completion: str
    prompt_ids: list[Count]
    completion_ids: list[Count]
    own: list[Count] | None = None
    reverse_kl: Numbers


class Problem(Schema):
    """One problem of an evaluation; the first line of the file has its settings instead. Of the first `completions`,
    `right` says which were; `question` is the last message of their prompt. Without a verifier there are sums over the
    tokens of all completions in place of `correct`, and the `conversation` that a prompt is of."""

    settings: Options = None
    problem: Count = 0
    prompt_hash: Text = ""
    n: Count = 0
    correct: Count = 0
    reverse_kl: Number = None
    student_entropy: Number = None
    teacher_log_prob: Number = None
    conversation: Text = ""
    lengths: list[Count] | None = None
    stopped: list[bool] | None = None
    question: Text = ""
    completions: list[str] | None = None
    right: list[bool] | None = None


# ---- checkpoints ----


class Sealed(Schema):
    bytes: Count
    sha256: Text = ""


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
    memories: dict[str, str] | None = None
    guard: Guarded


# ---- files ----

# Of a run or a comparison; a study and a probe have some of them too.
CONFIG = RunFile("config.yaml")
RECIPE = RunFile("recipe.yaml")
AS_BY_DEFAULT = "# As by default:\n"  # a line of both: what was chosen comes before it
_PATHS_BEGIN = "# Relative paths begin in "  # and where that is, seen from the file's folder, as JSON
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
CHECKPOINTS_ASIDE = "_earlier"  # a folder; transformers uploads nothing that begins so
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


def problems_name(suite: str, suites: Iterable[str] = ()) -> str:
    """`PROBLEMS` of a problem set, which may have any name; apart from the files of `suites`, which are beside it."""
    shared = any(suite != other and _suite(suite).casefold() == _suite(other).casefold() for other in suites)
    apart = f"-{hashlib.sha256(suite.encode()).hexdigest()[:8]}" if shared else ""
    return f"{_suite(suite)}{apart}.jsonl"


def _suite(name: str) -> str:
    return _slug(name, r"A-Za-z0-9._-").strip("-.")[:100] or "eval"


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


def with_paths_begin(path: Path, text: str) -> str:
    """A configuration that is written to `path`, with a last line that says where its relative paths begin: here."""
    return f"{text}{_PATHS_BEGIN}{json.dumps(from_here(path))}\n"


def from_here(path: Path) -> str:
    """The current directory, seen from the folder of a file: where the relative paths in that file begin."""
    return os.path.relpath(os.path.realpath(os.curdir), os.path.realpath(path.parent))


def paths_begin(text: str) -> str | None:
    """Where the relative paths of a configuration begin, seen from its folder; None where it does not say."""
    _, found, last = text.rpartition(f"\n{_PATHS_BEGIN}")
    try:
        place = json.loads(last) if found else None
    except ValueError:
        return None
    return place if isinstance(place, str) else None
