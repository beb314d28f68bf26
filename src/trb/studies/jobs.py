"""One piece of a study: a run, or the scores of a model, done in whatever process it is given to.

A job that is done is not done again, and one whose results are damaged is. Left out: which jobs there are
(`trb.studies.study`), their order (`trb.studies.sweep`), and where they run (`trb.studies.workers`).
"""

import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from trb import records
from trb.measures import OUTCOMES
from trb.models.loading import load_model
from trb.records import MODEL, REFERENCE_SCORES, RESULTS, SCORING, STUDY_PLAN, TEST, JsonFile
from trb.safety.files import exclusive
from trb.studies.directories import holds_scores, make_again
from trb.studies.material import as_teacher_reads, load_pair, load_teacher, load_tokenizers, problem_sets, routes_of
from trb.studies.places import Places
from trb.studies.run import train
from trb.studies.scores import evaluate_teachers, judge_of
from trb.studies.study import ProblemSets, Reference, Study, Unit, load_study
from trb.tasks.grading import Verifier
from trb.tasks.reward_free import is_reward_free
from trb.training.routes import by_name
from trb.training.teachers import shared_vocabulary
from trb.vocab import SharedVocabulary

__all__ = ["JUDGEMENT", "Job", "do_job", "is_done", "is_whole"]

# What may change between two starts: how results are judged, not what is run.
JUDGEMENT = ("description", "target", "level", "resamples")

Job = Unit | Reference


def do_job(directory: str, keep_models: bool, job: Job) -> float:
    """Do a job, unless it is done; returns the seconds it took."""
    start, study = time.monotonic(), _study_in(directory)
    if isinstance(job, Reference):
        _score_reference(study, Path(directory), job)
        return time.monotonic() - start
    run = Path(directory) / job.path
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run, wait=True, inside=True):
        if not is_done(Path(directory), job):
            if job.phase == "test" and not (run / MODEL).is_dir():  # removed once scored, and now needed again
                (run / RESULTS).unlink(missing_ok=True)
            train(study.recipe_of(job), run, initial_scores=_initial_scores(Path(directory), job.setting))
            if job.phase == "test":
                _score_trained(study, job, run)
            _keep_seconds(run, time.monotonic() - start)
        if job.phase == "test" and not keep_models:
            for leftover in (MODEL, SCORING):
                shutil.rmtree(run / leftover, ignore_errors=True)
    return time.monotonic() - start


def is_done(directory: Path, job: Job) -> bool:
    """Whether a job's results are there. Damaged ones are moved aside, so that the job is done again."""
    if isinstance(job, Reference):
        return is_whole(REFERENCE_SCORES, directory / job.path)
    if job.phase == "test":
        return is_whole(TEST, directory / job.path / TEST)
    return is_whole(RESULTS, directory / job.path / RESULTS, holds_scores)


def is_whole(file: JsonFile, path: Path, check: Callable[[Any], bool] = lambda _: True) -> bool:
    if not path.exists():
        return False
    try:
        if check(file.read(path)):
            return True
    except (IsADirectoryError, ValueError):
        pass
    make_again(path)
    return False


def _score_reference(study: Study, directory: Path, job: Reference) -> None:
    setting = study.settings[job.setting]
    run = study.scoring_recipe(job.setting, setting.dev).run
    student, teacher = load_pair(run)
    tokenizer, tokenizers = load_tokenizers(run)
    vocabulary = shared_vocabulary(student, tokenizer, by_name(teacher), by_name(tokenizers))
    model = student if job.role == "student" else teacher
    scores = {
        name: _score(study, job.setting, getattr(setting, name), model, teacher, None, vocabulary, job.role)
        for name in ("dev", "test")
    }
    REFERENCE_SCORES.write(directory / job.path, scores)


def _initial_scores(directory: Path, setting: str) -> list[dict[str, Any]]:
    """The untrained student on the development split: every run of a setting starts there."""
    path = directory / Reference(setting, "student").path
    suites = REFERENCE_SCORES.read(path)["dev"]["suites"].values()
    return [{key: value for key, value in suite.items() if key not in OUTCOMES} for suite in suites]


def _score_trained(study: Study, job: Unit, run: Path) -> None:
    """Score the model of a finished run on the test split, and keep the outcome of every problem."""
    problems = study.settings[job.setting].test
    recipe = study.scoring_recipe(job.setting, problems).run
    model = load_model(str(run / MODEL), dtype=recipe.student_dtype)  # it was saved with every stop id of its pair
    is_free = any(map(is_reward_free, problem_sets(recipe).values()))
    teacher = load_teacher(recipe, model) if is_free and not recipe.teachers else None
    TEST.write(run / TEST, _score(study, job.setting, problems, model, teacher, run / SCORING))


def _score(
    study: Study,
    setting: str,
    problems: ProblemSets,
    model: Any,
    teacher: Any,
    folder: Path | None,
    vocabulary: SharedVocabulary | None = None,
    role: str = "student",
) -> dict[str, Any]:
    """Scores per suite, each with what it is the mean of. Goes on where `folder` has results.

    `teacher` reads completions that nothing can check; None where there are none.
    """
    recipe = study.scoring_recipe(setting, problems)
    args = recipe.training_config("unused")
    tokenizer, teacher_tokenizer = load_tokenizers(recipe.run)
    sets: dict[str, Any] = problem_sets(recipe.run, args)
    judge = routes = None
    if teacher is not None and not recipe.run.teachers:
        pair = vocabulary or SharedVocabulary.of_pair(model, teacher, tokenizer, teacher_tokenizer)
        judge = judge_of(teacher, pair, sets, args)
    if role == "teacher":
        sets, routes = as_teacher_reads(sets, args), routes_of(recipe.run, args)
    outcomes: dict[str, dict[str, list[Any]]] = {}
    with Verifier(recipe.run.reward_timeout_s) as verifier:
        scores = evaluate_teachers(
            model,
            tokenizer=tokenizer,
            problems=sets,
            routes=routes,
            run=recipe.run,
            args=args,
            verifier=verifier,
            folder=folder,
            outcomes=outcomes,
            vocabulary=vocabulary,
            judge=judge,
        )
    return {"suites": {score["name"]: score | outcomes[score["name"]] for score in scores}}


def _keep_seconds(run: Path, seconds: float) -> None:
    """How long a run took, apart from what it found: that must not depend on the clock."""
    records.SECONDS.write(run / records.SECONDS, round(seconds, 1))


@cache
def _study_in(directory: str) -> Study:
    return load_study(Path(directory) / STUDY_PLAN, places=Places())  # they were found when it was written
