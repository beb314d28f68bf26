"""Every diagnostic of the paper's section 6 for one recipe, in one directory.

Leaves probe.json, rollouts.jsonl and provenance.json, and finished parts on the way, so that a killed probe goes on. It
is a single process. Left out: what is measured (`trb.studies.diagnostics`) and how it is drawn (`trb.report.probe`).
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trb.errors import InputError, named
from trb.models.adapters import adapter_base
from trb.models.identity import fingerprint
from trb.models.sharing import is_shared
from trb.policies import BehaviorPolicy, SKDPolicy, StudentPolicy, TrustRegionPolicy
from trb.records import PART, PARTS, PROBE, PROBE_SETTINGS, PROVENANCE, ROLLOUTS, RUN_MARKS, from_here, part_name
from trb.safety.files import finite, json_types
from trb.sampling.uniforms import SEED_BOUNDS, SEEDS
from trb.schedule import completion_budget
from trb.studies import provenance
from trb.studies.advice import advise, outlook
from trb.studies.claims import left_as_found
from trb.studies.diagnostics import (
    KL_BUDGETS,
    LEVEL,
    SKD_TOP_K,
    budget_curve,
    check_truncations,
    continuation_probe,
    default_truncations,
    matched_excerpts,
    replacement_curve,
)
from trb.studies.directories import make_again, sole_run, told_apart
from trb.studies.listener import Listener
from trb.studies.material import (
    RunDirectoryError,
    as_teacher_reads,
    load_pair,
    load_tokenizers,
    model_of_run,
    problem_sets,
    template_options,
)
from trb.studies.places import seen_from
from trb.studies.recipe import Recipe
from trb.studies.scores import precision
from trb.studies.subject import ROWS, Remember, Subject
from trb.studies.yaml_files import ConfigError
from trb.tasks.grading import Verifier
from trb.training.behaviors import sequence_budget_of
from trb.training.config import TRBConfig
from trb.training.methods import CHOICES, behavior_of, kl_budget_of

__all__ = ["probe"]

# What the numbers of a probe depend on; rows in flight and the device only round differently.
_READ_OF_RECIPE = (
    *("student_revision", "student_dtype", "student_keep_layers", "teacher", "teacher_revision", "teacher_dtype"),
    "teacher_quantization",
    *("chat_template", "system_prompt", "eval_data", "eval_split", "eval_seed", "eval_limit", "reward_timeout_s"),
    *("eval_prompt_column", "eval_answer_column", "eval_privileged_column", "eval_assistant_turns"),
)

_NOT_KEPT = ("recipe", "max_rows", "device")
_FILES = ("student_files", "teacher_files")
_PATHS_BEGIN = "relative_paths_begin_in"


def probe(
    recipe: Recipe,
    output_dir: str | os.PathLike[str],
    *,
    model: str | None = None,
    budgets: Sequence[float] = KL_BUDGETS,
    truncations: Sequence[int] | None = None,
    kl_budget: float | None = None,
    skd_top_k: Sequence[int] = SKD_TOP_K,
    problems: int = 128,
    samples: int = 4,
    excerpts: int = 4,
    alternatives: int = 3,
    advice: bool = True,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Every diagnostic of a recipe's pair, on its evaluation problems; returns what probe.json holds.

    Writes probe.json (infinities as null), provenance.json and rollouts.jsonl (the excerpts). Finished parts stay in
    parts/, from where a killed probe goes on; a finished probe with the same settings is returned as it is.

    Args:
        recipe: a checked recipe with `eval_data`. Its methods, if any, only tell the settings of trb and skd.
        output_dir: the directory of this probe.
        model: another student than the recipe's: a run directory (its model/ is read), or a model spec.
        budgets: of `budget_curve`; empty to leave it out.
        truncations: of `continuation_probe`, in tokens; by default `default_truncations`, empty to leave it out.
        kl_budget: of the trust region in the continuation probe and the excerpts; by default the recipe's first, or
            that of the method trb where the recipe's rollouts have none.
        skd_top_k: of `replacement_curve`, at the recipe's `skd_teacher_temperature`; empty to leave it out.
        problems: at most so many of every problem set.
        samples: rollouts per problem and policy.
        excerpts: problems shown token by token; 0 for none.
        alternatives: likeliest tokens per law shown with each token.
        advice: measure what `trb.studies.advice` needs: the teacher's rollouts, and gradients of the student's
            parameters (four copies of them at a time).
        max_new_tokens: longest completion; by default the recipe's max_completion_length.
        max_rows: completions in flight; by default `eval_max_rows` of the recipe, or 256.
        seed: of the draws; by default the recipe's.
        overwrite: remove the probe that the directory holds.
        listener: hears about progress.

    Raises:
        ConfigError: a recipe without evaluation data.
        RunDirectoryError: the directory holds a probe with other settings.
        ValueError, OSError: a value out of range, or models or data that cannot be loaded or do not go together.
    """
    if not recipe.run.eval_data:
        raise ConfigError(f"{recipe.source}: eval_data is empty; a probe needs problems with answers")
    directory, listener = Path(output_dir), listener or Listener()
    settings = _Settings.of(
        recipe,
        directory,
        model=model,
        budgets=tuple(map(float, budgets)),
        truncations=truncations,
        kl_budget=kl_budget,
        skd_top_k=tuple(skd_top_k),
        problems=problems,
        samples=samples,
        excerpts=excerpts,
        alternatives=alternatives,
        advice=advice,
        max_new_tokens=max_new_tokens,
        max_rows=max_rows,
        seed=seed,
    )
    with sole_run(directory, inside=True):  # beside the runs of a study, it touches none of them
        return _probe_alone(recipe, settings, directory, overwrite, listener)


def _probe_alone(
    recipe: Recipe, settings: "_Settings", directory: Path, overwrite: bool, listener: Listener
) -> dict[str, Any]:
    """The probe itself, in a directory that nobody else writes to."""
    parts, finished = _Parts(directory / PARTS, listener), directory / PROBE
    parts.check(settings.to_dict(), overwrite)
    if finished.exists() and not overwrite:
        try:
            results = PROBE.read(finished)
            listener.stage("already finished, nothing done")
            return results
        except ValueError:
            make_again(finished)
    ours = [directory / name for name in (PARTS, PROBE, ROLLOUTS, PROVENANCE)]
    with Verifier(recipe.run.reward_timeout_s) as verifier, left_as_found(ours, begun=parts.begun):
        listener.stage("loading models and problems")
        subject, counts = settings.load(verifier, parts)
        # Not before: a probe that cannot start must not claim the directory.
        if overwrite:
            _clear(directory)
        parts.claim(settings.to_dict())
        provenance.write(directory)
        results = _measure(settings, subject, counts, directory, listener)
    PROBE.write(finished, results)
    return results


@dataclass(frozen=True)
class _Settings:
    """Everything that decides the numbers of a probe."""

    recipe: Recipe
    student: str
    budgets: tuple[float, ...]
    truncations: tuple[int, ...]
    kl_budget: float
    skd_top_k: tuple[int, ...]
    skd_default_top_k: int
    skd_temperature: float
    problems: int
    samples: int
    excerpts: int
    alternatives: int
    advice: bool
    sequence_kl_budget: float
    loss_top_k: int
    max_new_tokens: int
    max_rows: int
    seed: int
    temperature: float
    template_options: Mapping[str, Any]
    teacher_system_prompt: str | None
    teacher_prompt_template: str
    dtype: str | None
    device: str

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        directory: Path,
        *,
        model: str | None,
        truncations: Sequence[int] | None,
        kl_budget: float | None,
        max_new_tokens: int | None,
        max_rows: int | None,
        seed: int | None,
        **given: Any,
    ) -> "_Settings":
        args = recipe.training_config(directory)
        if args.world_size > 1:
            raise ConfigError("a probe runs in one process; start it without a launcher")
        if args.tools:
            raise ConfigError("a probe looks at completions of one turn; leave tools out (null) to look at the first")
        if recipe.run.teachers:
            raise ConfigError(
                f"a probe looks at one pair, and the recipe has the teachers {', '.join(recipe.run.teachers)}: give it "
                "a recipe with one of them as teacher, and problems of its own"
            )
        trb, skd = (_variant(recipe, method).training_config(directory) for method in ("trb", "skd"))
        blending = _blending(recipe, trb)
        longest = int(args.max_completion_length or 0) if max_new_tokens is None else max_new_tokens
        return cls(
            recipe=recipe,
            student=recipe.run.student if model is None else model_of_run(model),
            truncations=default_truncations(longest) if truncations is None else tuple(truncations),
            kl_budget=kl_budget_of(behavior_of(blending).at(0)) if kl_budget is None else kl_budget,
            skd_default_top_k=skd.skd_teacher_top_k,
            skd_temperature=skd.skd_teacher_temperature,
            sequence_kl_budget=_completion_nats(blending),
            loss_top_k=args.loss_top_k,
            max_new_tokens=longest,
            max_rows=max_rows or recipe.run.eval_max_rows or ROWS,
            seed=args.seed if seed is None else seed,
            temperature=args.temperature,
            template_options=template_options(args),
            teacher_system_prompt=args.teacher_system_prompt,
            teacher_prompt_template=args.teacher_prompt_template,
            dtype=args.autocast_dtype,
            device=str(args.device),
            **given,
        )

    def __post_init__(self) -> None:
        for name, smallest in (("problems", 2), ("samples", 1), ("excerpts", 0), ("alternatives", 0)):
            if getattr(self, name) < smallest:
                raise InputError(f"{named(name)} must be at least {smallest}, got {getattr(self, name)}")
        for name in ("max_new_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{named(name)} must be at least 1, got {getattr(self, name)}")
        if not (isinstance(self.seed, int) and self.seed in SEEDS):  # of floats Python tries one by one
            raise InputError(f"{named('seed')} must lie in {SEED_BOUNDS}, got {self.seed}")
        check_truncations(self.truncations, self.max_new_tokens)
        for budget in (*self.budgets, self.kl_budget):
            TrustRegionPolicy(budget)
        for top_k in self.skd_top_k:
            SKDPolicy(top_k, self.skd_temperature)

    def to_dict(self) -> dict[str, Any]:
        """What another probe must agree on to go on from this one's parts, as JSON types."""
        run = replace(self.recipe.run, eval_limit=self._limit)
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in _NOT_KEPT}
        revision = run.student_revision if self.student == run.student else None
        models = (self.student, revision), (run.teacher, run.teacher_revision)
        own |= dict(zip(_FILES, (fingerprint(*model) for model in models), strict=True))
        return json_types({name: getattr(run, name) for name in _READ_OF_RECIPE} | own)

    @property
    def _limit(self) -> int:
        return min(self.problems, self.recipe.run.eval_limit or self.problems)

    def load(self, verifier: Verifier, remember: Remember) -> tuple[Subject, dict[str, int]]:
        """The subject, and how many problems each set contributed."""
        run = replace(self.recipe.run, eval_limit=self._limit)
        tokenizer, teacher_tokenizer = load_tokenizers(run)
        sets = problem_sets(run)
        if self.student != run.student:
            if is_shared(run.teacher) and adapter_base(self.student) is None:
                raise ConfigError(
                    f"{self.student} is a whole model, and the teacher ({run.teacher}) is what is under an adapter of "
                    "the student: pass a run that has trained one, or set teacher to a model of its own"
                )
            run = replace(run, student=self.student, student_revision=None)
        student, teacher = (model.to(self.device) for model in load_pair(run))  # type: ignore[arg-type]
        taught = as_teacher_reads(sets, self)
        own = any(taught[name] is not rows for name, rows in sets.items())
        subject = Subject(
            student,
            teacher,
            tokenizer,
            [row for rows in sets.values() for row in rows],
            verifier,
            teacher_problems=[row for rows in taught.values() for row in rows] if own else None,
            samples=self.samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            max_rows=self.max_rows,
            teacher_tokenizer=teacher_tokenizer,
            template_options=self.template_options,
            remember=remember,
        )
        return subject, {name: len(rows) for name, rows in sets.items()}


def _variant(recipe: Recipe, method: str) -> Recipe:
    """The recipe of the first entry that trains by `method`, or else the recipe itself."""
    for name, entry in recipe.run.methods.items():
        if (entry or {}).get("method", name) == method:
            return recipe.for_method(name)
    return recipe


def _blending(recipe: Recipe, args: TRBConfig) -> TRBConfig:
    """A configuration, or, where its rollouts have no budget, that of the method trb in its place."""
    if hasattr(behavior_of(args).at(0), "kl_budget"):
        return args
    training = {key: value for key, value in recipe.training.items() if key not in CHOICES}
    run = replace(recipe.run, methods={})
    return replace(recipe, run=run, training={**training, "method": "trb"}).training_config(str(args.output_dir))


def _completion_nats(args: TRBConfig) -> float:
    """Nats that a completion is given at first; where every token has a budget of its own, those of the knob."""
    held = completion_budget(behavior_of(args).schedule)
    return sequence_budget_of(args) if held is None else held.target


def _measure(
    settings: _Settings, subject: Subject, counts: dict[str, int], directory: Path, listener: Listener
) -> dict[str, Any]:
    trust_region = TrustRegionPolicy(settings.kl_budget)
    policies: dict[str, BehaviorPolicy] = {"student": StudentPolicy(), "trb": trust_region}
    shown = {**policies, "skd": SKDPolicy(settings.skd_default_top_k, settings.skd_temperature)}
    results: dict[str, Any] = {
        "student": settings.student,
        "teacher": settings.recipe.run.teacher,
        "problems": counts,
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "kl_budget": settings.kl_budget,
        "skd_teacher_temperature": settings.skd_temperature,
        "seed": settings.seed,
        "level": LEVEL,
        "continuation": None,
        "budgets": None,
        "replacement": None,
        "outlook": None,
        "advice": None,
    }
    with precision(settings.recipe.training_config(directory)):
        if settings.truncations:
            results["continuation"] = continuation_probe(subject, policies=policies, truncations=settings.truncations)
        if settings.budgets:
            results["budgets"] = budget_curve(subject, budgets=settings.budgets)
        if settings.skd_top_k:
            results["replacement"] = replacement_curve(
                subject, top_ks=settings.skd_top_k, teacher_temperature=settings.skd_temperature
            )
        if settings.advice:
            results["outlook"] = outlook(
                subject, sequence_kl_budget=settings.sequence_kl_budget, loss_top_k=settings.loss_top_k
            )
            results["advice"] = dataclasses.asdict(advise(results["outlook"]))
        if settings.excerpts:
            listener.stage("excerpts")
            records = matched_excerpts(subject, policies=shown, prompts=settings.excerpts, top=settings.alternatives)
            ROLLOUTS.write(directory / ROLLOUTS, records)
    return finite({**results, "provenance": provenance.describe()})


class _Parts:
    """Remembers finished parts as files, so that a killed probe goes on from there."""

    def __init__(self, folder: Path, listener: Listener) -> None:
        self.folder, self.listener = folder, listener

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self.folder / part_name(name)
        if path.exists():
            try:
                return PART.read(path)
            except ValueError:
                make_again(path)
        self.listener.stage(name)
        value = compute()
        PART.write(path, value)
        return value

    def begun(self) -> bool:
        """Whether a part is there."""
        return any(PART.claims(part) and part.name != PROBE_SETTINGS.name for part in self.folder.glob("*"))

    def check(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Refuse a directory that holds a run, or a probe with other settings that is not to be overwritten."""
        path, directory = self.folder / PROBE_SETTINGS, self.folder.parent
        runs = [file for file in RUN_MARKS if (directory / file).exists()]
        if runs:
            raise RunDirectoryError(f"{directory} holds {runs[0]} of a training run; give the probe its own directory")
        if self.begun() and path.exists() and not overwrite:
            there, here = PROBE_SETTINGS.read(path), settings
            unknown = {key: settings[key] for key in _FILES if None in (there.get(key), settings[key])}
            if isinstance(begin := there.pop(_PATHS_BEGIN, None), str):  # older versions did not say
                there, here = seen_from(path.resolve().parent / begin, there, here, sets=True)
            different = told_apart({**there, **unknown}, here)
            if different:
                raise RunDirectoryError(
                    f"{directory} holds another probe: {'; '.join(different.values())}. Use another output directory, "
                    "or --overwrite to remove what is there"
                )

    def claim(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / PROBE_SETTINGS
        PROBE_SETTINGS.write(path, {**settings, _PATHS_BEGIN: from_here(path)})


def _clear(directory: Path) -> None:
    """Remove what a probe writes, and nothing else."""
    if (directory / PARTS / PROBE_SETTINGS).exists():
        shutil.rmtree(directory / PARTS)
        for file in (PROBE, ROLLOUTS, PROVENANCE):
            (directory / file).unlink(missing_ok=True)
