"""Runs a study to its end: references, selection, test; killed and started again, it ends the same.

On local processes or as tasks of a Ray cluster; what a study is, says `trb.studies.study`.

A study directory holds study.yaml, provenance.json (of the first start), one folder per setting and, in the end,
study.json. A setting's folder has reference/ (scores of the untrained student and the teacher), select/ and
test/ with a run directory per training run, and selection.json, written once and never changed. Whatever is finished
is kept: a study that was killed goes on where it was, and ends with the same study.json.

The test split is scored after the choice is on disk, once per chosen run, from the model that the run wrote.

Left out on purpose: judging the results (`trb.studies.findings`), and what one run does (`trb.studies.run`).
"""

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from trb import records
from trb.errors import InputError
from trb.records import CONFIG, MODEL, SELECTION, STUDY, STUDY_PLAN
from trb.safety.files import LOCK, remove
from trb.safety.untrusted import parse_yaml
from trb.studies import findings, provenance
from trb.studies.claims import has_step, left_as_found
from trb.studies.directories import models_of, paths_begin_in, sole_run, warn_of_other_models, write_configuration
from trb.studies.jobs import JUDGEMENT, Job, is_done, is_whole
from trb.studies.material import RunDirectoryError, problem_sets, routes_of, unrouted
from trb.studies.places import seen_from
from trb.studies.study import AS_WRITTEN, IN_VAIN, ROLES, Phase, Reference, Study
from trb.studies.workers import Pool, open_pool
from trb.tasks.conversations import conversation_of
from trb.tasks.reward_free import is_reward_free

__all__ = ["StudyListener", "run_study"]

logger = logging.getLogger(__name__)


class StudyListener:
    """Hears how far a study is. This one is silent."""

    def stage(self, text: str) -> None:
        """What happens from now on, in a few words."""

    def phase(self, name: str, done: int, total: int) -> None:
        """A phase begins, with `done` of its `total` runs finished earlier."""

    def finished(self, job: str, seconds: float) -> None:
        """One run of the phase is finished."""


def run_study(
    study: Study,
    directory: str | os.PathLike[str],
    *,
    workers: int | None = None,
    ray: str | None = None,
    gpus: float = 0,
    keep_models: bool = False,
    listener: StudyListener | None = None,
) -> dict[str, Any]:
    """Run what a study still lacks, and judge it; returns what study.json holds.

    Args:
        study: a checked study (`trb.studies.study.load_study`).
        directory: the study directory. A study that was begun there goes on; another one is refused. More test
            seeds, settings and methods may join a study that is on disk, and how results are judged may change.
        workers: runs at once; `default_workers` if None. With Ray, None leaves it to the cluster.
        ray: address of a Ray cluster ("local" starts one here, "auto" finds a running one); None for local processes.
            Every node must see `directory` under the same path.
        gpus: GPUs that each Ray task asks for.
        keep_models: keep the trained models of the test runs; they are removed once scored otherwise.
        listener: hears about progress.

    Raises:
        RunDirectoryError: the directory holds another study, cannot be written, or another sweep is running there.
        StudyError: a run failed, or its process died. Finished runs are intact.
        ValueError: development and test problems overlap.
    """
    directory, listener = Path(directory).absolute(), listener or StudyListener()
    with sole_run(directory, what="sweep"):
        goes_on = _goes_on(directory, study)
        listener.stage("checking that development and test problems differ")
        for name in study.settings:
            _check_problems(study, name)
        settings = [] if goes_on else list(study.settings)
        ours = [directory / STUDY_PLAN, directory / records.PROVENANCE, *(directory / name for name in settings)]
        finished: list[Job] = []
        with (
            left_as_found(ours, begun=lambda: bool(finished) or (not goes_on and _has_step(directory))),
            open_pool(directory, study, workers, ray, gpus, keep_models) as pool,
        ):
            _begin(directory, study, goes_on)
            do = partial(_run, pool, directory=directory, listener=listener, finished=finished)
            do("references", [Reference(name, role) for name in study.settings for role in ROLES])
            do("selection", study.units("select"))
            chosen = {name: _select(study, directory, name) for name in study.settings}
            do("test", tested := study.units("test", chosen))
    if keep_models:
        _warn_of_removed([directory / unit.path for unit in tested])
    listener.stage("comparing" if finished else "already finished, nothing done but comparing again")
    results = findings.assemble(study, directory)
    STUDY.write(directory / STUDY, results)
    return results


# ---- selection ----


def _select(study: Study, directory: Path, setting: str) -> dict[str, int]:
    """The chosen configuration of every family: read if it is on disk, made and written otherwise."""
    path = directory / setting / SELECTION
    chosen = dict(_chosen(SELECTION.read(path))) if is_whole(SELECTION, path) else {}
    if chosen.keys() != study.methods.keys():  # the same again, from the same scores; with methods that joined
        table = findings.selection(study, directory, setting)
        SELECTION.write(path, {"select_by": study.select_by, "seeds": study.seeds.select, "methods": table})
        chosen = dict(_chosen(SELECTION.read(path)))
    return chosen


def _chosen(table: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, rows in table["methods"].items():
        yield name, [bool(row["selected"]) for row in rows].index(True)


def _run(
    pool: Pool, phase: str, jobs: Sequence[Job], *, directory: Path, listener: StudyListener, finished: list[Job]
) -> None:
    """Do the jobs that are not done; those that are finished join a list."""
    missing = [job for job in jobs if not is_done(directory, job)]
    listener.phase(phase, len(jobs) - len(missing), len(jobs))
    for job, seconds in pool.map(missing) if missing else ():
        finished.append(job)
        listener.finished(str(job), seconds)


def _warn_of_removed(runs: Sequence[Path]) -> None:
    """Say which models cannot be kept any more: those that an earlier start has removed."""
    gone = [run for run in runs if not (run / MODEL).is_dir()]
    if gone:
        logger.warning(
            "--keep-models came too late for %d of %d runs, whose models were removed once they were scored; remove "
            "%s to have that one trained again",
            *(len(gone), len(runs), gone[0]),
        )


# ---- the directory ----


def _goes_on(directory: Path, study: Study) -> bool:
    """Whether the study that a directory holds goes on; one without a step makes room for another.

    Raises RunDirectoryError if it is another one and has steps, or if the directory holds something else.
    """
    path = directory / STUDY_PLAN
    if path.exists():
        try:
            _check_same(path, study)
        except RunDirectoryError:
            # A plan alone may be anybody's; with its provenance it is that of a study.
            if _has_step(directory) or not (directory / records.PROVENANCE).exists():
                raise
            return False
        return True
    if any(entry.name not in (LOCK, records.PROVENANCE.name) for entry in directory.iterdir()):
        raise RunDirectoryError(f"{directory} is not empty and holds no study; use another output directory")
    return False


def _has_step(directory: Path) -> bool:
    """Whether one of a study's runs has taken a step."""
    return any(has_step(path.parent) for path in directory.rglob(CONFIG.name))


def _begin(directory: Path, study: Study, goes_on: bool) -> None:
    path = directory / STUDY_PLAN
    if not goes_on:  # scores of models that another study named
        for setting in _written_settings(path) | set(study.settings):
            for name in (records.REFERENCE, *get_args(Phase), SELECTION.name):
                remove(directory / setting / name)
    settings = [study.scoring_recipe(name, setting.test).run for name, setting in study.settings.items()]
    models = {spec: found for run in settings for spec, found in models_of(run).items()}
    if goes_on and (directory / records.PROVENANCE).exists():
        warn_of_other_models(directory, models)
    else:
        provenance.write(directory, models)
    write_configuration(path, study.to_yaml())


def _written_settings(path: Path) -> set[str]:
    """The settings of the study that a file describes, as far as they can be read and name folders."""
    try:
        return set(_written(path)["settings"])
    except (OSError, ValueError, yaml.YAMLError):
        return set()


def _written(path: Path) -> dict[str, Any]:
    """What a file says of a study, without the keys that older versions took in vain.

    Raises OSError, ValueError and YAMLError for a file that holds none.
    """
    study = Study.model_validate(parse_yaml(path.read_text(encoding="utf-8")), context=AS_WRITTEN).model_dump()
    for part in (study, *study["settings"].values()):
        for options in (part["recipe"], *itertools.chain(*part["methods"].values())):
            for key in IN_VAIN.keys() & options.keys():
                del options[key]
    return study


def _check_same(path: Path, study: Study) -> None:
    """Refuse to go on with a study whose finished runs would not belong to it."""
    try:
        there = _written(path)
    except (ValueError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{path} is damaged ({error!s:.200}); use another output directory") from error
    here = study.model_dump()
    if (begin := paths_begin_in(path)) is not None:
        there, here = seen_from(begin, there, here)
    kept = set(there["seeds"]["test"]) <= set(here["seeds"]["test"])
    there["seeds"]["test"] = here["seeds"]["test"] if kept else there["seeds"]["test"]
    here["methods"] = _those_in(there["methods"], here["methods"])
    here["settings"] = _those_in(there["settings"], here["settings"])
    for setting in filter(None, here["settings"].values()):
        setting["methods"] = {name: own for name, own in setting["methods"].items() if name in there["methods"]}
    changed = [key for key in there if key not in JUDGEMENT and there[key] != here[key]]
    if changed:
        key = changed[0]
        raise RunDirectoryError(
            f"{path.parent} holds a study with other {key}: {_difference(there[key], here[key])}. Settings, methods "
            "and test seeds may join a study; for anything else use another output directory"
        )


def _those_in(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    return {name: here.get(name) for name in there}


def _difference(there: Any, here: Any, where: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in there | here:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{where}{key}.")
    return f"{where.rstrip('.') or 'it'} is {there!r:.80} there and {here!r:.80} here"


def _check_problems(study: Study, setting: str) -> None:
    """Raises ValueError if a development problem is also a test problem, if they are measured differently, or if the
    test problems are too few for an interval."""
    # A conversation is known by the whole of its text, and the last of its turns by what comes before the reply.
    prompts: dict[str, dict[str, str]] = {}
    kinds: dict[bool, str] = {}
    for name in ("dev", "test"):
        recipe = study.scoring_recipe(setting, getattr(study.settings[setting], name))
        args = recipe.training_config("unused")
        sets, routes = problem_sets(recipe.run, args), routes_of(recipe.run, args)
        for doubt in [] if routes is None else unrouted(routes, sets):
            raise InputError(f"{setting}: {doubt.text}, and a study scores the teachers, too: add the column")
        kinds |= {is_reward_free(rows): f"{data} ({name})" for data, rows in sets.items()}
        if name == "test":
            _check_spread(setting, sets, len(study.seeds.test))
        found = [(conversation_of(row), json.dumps(row["prompt"])) for rows in sets.values() for row in rows]
        prompts[name] = {whole or prompt: prompt for whole, prompt in found}
    if len(kinds) > 1:
        raise InputError(
            f"{setting}: {kinds[False]} has answers to score against and {kinds[True]} has none; give it development "
            "and test problems of one kind"
        )
    tested = {*prompts["test"], *prompts["test"].values()}
    shared = sum(not tested.isdisjoint(known) for known in prompts["dev"].items())
    if shared:
        raise InputError(
            f"{setting}: {shared} development problems are test problems too; choose another seed or split for one"
        )


def _check_spread(setting: str, sets: Mapping[str, Any], seeds: int) -> None:
    """Raises ValueError for a problem set without two problems; one set alone needs none where seeds show a spread."""
    if len(sets) == 1 and seeds > 1:
        return
    for data, rows in sets.items():
        if len({json.dumps(row["prompt"]) for row in rows}) < 2:
            times = f", {len(rows)} times" if len(rows) > 1 else ""
            remedy = "raise limit or take it out of data" if len(sets) > 1 else "raise limit, or give more test seeds"
            raise InputError(
                f"{setting}: test: {data} has one problem{times}, and an interval over problems needs two: {remedy}"
            )
