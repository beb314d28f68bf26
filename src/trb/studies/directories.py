"""Directories of runs: whose they are, what may go on in them, what is cleared, set aside, sealed or made again.

A directory belongs to one configuration; another one is refused, and damaged results are named and moved aside. Left
out: what the files mean (`trb.records`), checkpoints (`trb.training.checkpoints`), and full disks
(`trb.studies.disks`).
"""

import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from transformers import TrainerState

from trb import records
from trb.errors import MissingFileError
from trb.models.identity import fingerprints
from trb.records import CHECKSUMS, CONFIG, EVALUATIONS, MODEL, RECIPE, RESULTS, SCORES, SKIPPED
from trb.safety.files import LOCK, UNFINISHED, exclusive, remove, remove_unfinished, write_text
from trb.safety.untrusted import parse_yaml, printable
from trb.studies import provenance
from trb.studies.claims import has_step, without_what_is_made
from trb.studies.disks import require_writable
from trb.studies.keys import ASKING_KEYS, RunConfig, checked_value, is_method_name
from trb.studies.material import RunDirectoryError
from trb.studies.places import Places, seen_from
from trb.studies.recipe import Recipe
from trb.training import checkpoints, resume
from trb.training.checkpoints import CheckpointError
from trb.training.config import TRBConfig
from trb.training.methods import every_knob
from trb.training.ranks import Ranks
from trb.training.recording import drop_after_step

__all__ = [
    "asked_by_run",
    "begin",
    "check_claim",
    "check_shared_recipe",
    "clear_comparison",
    "completion_length_of",
    "finish_ending",
    "finish_pruning",
    "finished_results",
    "has_begun_with",
    "holds_scores",
    "is_damaged",
    "is_last",
    "listed_methods",
    "make_again",
    "models_of",
    "named_checkpoint",
    "paths_begin_in",
    "seal_run",
    "set_aside",
    "size_of_run",
    "sole_run",
    "state_of",
    "told_apart",
    "warn_of_other_models",
    "write_configuration",
    "written_by_run",
]

logger = logging.getLogger(__name__)

# What may differ when a run is continued: how long it is (the trainer refuses that where its schedule depends on it),
# and what it leaves behind, not what it computes.
_MAY_CHANGE = {*resume.FREE, *resume.LENGTH, "eval_every", "eval_max_rows", "save_final_model"}

_OF_A_RUN = (*records.MEASUREMENTS, CONFIG, records.PROVENANCE, RESULTS)

# Differences that a refusal names.
_LISTED = 20
_SEALED = (*_OF_A_RUN, RECIPE, MODEL, EVALUATIONS, SKIPPED)

_REMOVED = (*_OF_A_RUN, records.REPORT, records.CHECKSUMS, MODEL, records.MODEL_PARTIAL, EVALUATIONS, SKIPPED)


def seal_run(directory: Path, args: TRBConfig) -> None:
    """Checksums of what a run or a comparison has left, its checkpoints apart, which have their own."""
    files = [directory / name for name in _SEALED]
    checkpoints.seal(directory, checksums=args.checkpoint_checksums, files_of=files)


def told_apart(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """The keys that two configurations have otherwise, each with both values in words."""
    keys = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    return {key: f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys}


def _differences(path: Path, recipe: Recipe, ignore: frozenset[str] = frozenset()) -> dict[str, str]:
    """What a written configuration says otherwise than `recipe`; nothing if there is none."""
    if not path.exists():
        return {}
    there = _written_recipe(path)
    if there is None:
        kept = (path.parent / RESULTS).exists() or checkpoints.numbered(path.parent)
        remedy = "" if kept else ", or --overwrite to start over"
        raise RunDirectoryError(
            f"{path} is damaged; restore it (the recipe with its defaults), or use another output directory{remedy}"
        )
    # As it would be read back: through YAML, so that tuples and numbers compare alike.
    here = _keys_in(recipe.to_yaml()) or {}
    if (begin := paths_begin_in(path)) is not None:  # older versions did not say
        there, here = seen_from(begin, there, here)
    # An option that the version which wrote it did not have yet, and that changes no result, is no difference. Nor is a
    # knob that only methods read which one of the two does not have: which methods those are is compared itself.
    new = {key for key in here if key not in there and key in _MAY_CHANGE}
    others = every_knob() & (there.keys() ^ here.keys())
    return {key: text for key, text in told_apart(there, here).items() if key not in ignore | new | others}


def write_configuration(path: Path, text: str) -> None:
    """Write the text of a recipe or a study, and where its relative paths begin: in the current directory."""
    write_text(path, records.with_paths_begin(path, text))


def paths_begin_in(path: Path) -> Path | None:
    """Where the relative paths of a written configuration begin; None where it does not say."""
    try:
        begin = records.paths_begin(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError):
        return None
    return None if begin is None else path.resolve().parent / begin


def _written_recipe(path: Path) -> Mapping[str, Any] | None:
    """The keys of a written configuration, or None if it is damaged."""
    try:
        return _keys_in(path.read_bytes().decode("utf-8"))
    except (IsADirectoryError, yaml.YAMLError, ValueError):
        return None


@lru_cache(maxsize=8)  # of one run, the same text is read several times; read-only, as all who ask share it
def _keys_in(text: str) -> Mapping[str, Any] | None:
    there = parse_yaml(text)
    return MappingProxyType(there) if isinstance(there, dict) else None


def completion_length_of(spec: str) -> tuple[int, Path] | None:
    """The longest completion that the recipe of a run evaluates with, and the file that says so.

    `spec` names the run's directory, its model or one of its checkpoints; None for anything else.
    """
    for config, recipe in _recipes_of(spec):
        lengths = [recipe.get(key) for key in ("eval_max_new_tokens", "max_completion_length")]
        if found := [length for length in lengths if isinstance(length, int) and length > 0]:
            return found[0], config
    return None


def asked_by_run(spec: str) -> tuple[dict[str, Any], Path] | None:
    """What the recipe of a run says of how its evaluations ask (`ASKING_KEYS`), and the file that says so; `spec` as in
    `completion_length_of`.

    Raises:
        ConfigError: a value that such a key cannot have.
    """
    for config, recipe in _recipes_of(spec):
        said = {key: recipe[key] for key in ASKING_KEYS if recipe.get(key) is not None}
        return {key: checked_value(key, value, str(config)) for key, value in said.items()}, config
    return None


def _recipes_of(spec: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """What the files of a run's recipe hold, by their paths."""
    path = Path(spec).expanduser()
    for config in (path / CONFIG, path.parent / CONFIG):
        recipe = _written_recipe(config) if config.is_file() else None
        if recipe:
            yield config, recipe


def is_damaged(path: Path) -> bool:
    return path.exists() and _written_recipe(path) is None


def check_claim(
    directory: Path, recipe: Recipe, checkpoint: Path | None, accept_changes: bool, *, warn: bool = True
) -> Path | None:
    """The checkpoint to go on from, if any. Raises RunDirectoryError if the directory holds another run."""
    if checkpoint is not None and not (directory / CONFIG).exists():
        raise RunDirectoryError(
            f"{directory} holds checkpoints but no {CONFIG}, so it is unknown what they are; "
            "use another output directory"
        )
    # A configuration alone may be anybody's; with its provenance it is that of a run which has done nothing yet.
    if checkpoint is None and (directory / records.PROVENANCE).exists() and not has_step(directory):
        return None
    if is_damaged(directory / CONFIG) and _says_itself(checkpoint):
        if warn:
            logger.warning("%s is damaged: what %s says of its run is compared", directory / CONFIG, checkpoint)
        return checkpoint
    found = _differences(directory / CONFIG, recipe)
    # A longer run may go on from a checkpoint; without one it would silently start over. One that is finished was as
    # long as it was to be, and its results would be replaced.
    fixed = {key for key in found if key not in _MAY_CHANGE or checkpoint is None}
    fixed |= found.keys() & set(resume.LENGTH if (directory / RESULTS).exists() else ())
    refused = [text for key, text in found.items() if key in fixed]
    if refused and not (accept_changes and checkpoint is not None):
        _refuse(directory / CONFIG, refused, can_accept=checkpoint is not None)
    if refused and warn:
        logger.warning("%s goes on with changes: %s", directory, printable("; ".join(refused)))
    return checkpoint


def has_begun_with(directory: Path, named: str) -> bool:
    """Whether the run in a directory has begun with the checkpoint that is named here, as far as can be read."""
    config = directory / CONFIG
    there = (_written_recipe(config) or {}).get("resume_from_checkpoint")
    begin = paths_begin_in(config) or Path()
    return isinstance(there, str) and (begin / Path(there).expanduser()).resolve() == Path(named).expanduser().resolve()


def _says_itself(checkpoint: Path | None) -> bool:
    """Whether a checkpoint says which run it is of."""
    try:
        return checkpoint is not None and resume.read(checkpoint) is not None
    except ValueError:
        return False


def check_shared_recipe(directory: Path, recipe: Recipe) -> bool:
    """Whether a comparison goes on with what is there; if not, that is of another recipe and without a step.

    Raises RunDirectoryError if it is of another recipe and has steps.
    """
    path = directory / RECIPE
    runs = (directory / name for name in listed_methods(directory) | set(recipe.run.methods))
    # A recipe alone may be anybody's; beside scores it is that of a comparison.
    begun = not (directory / EVALUATIONS).is_dir() or any(map(has_step, (directory, *runs)))
    if not begun and is_damaged(path):
        return False
    differences = _differences(path, recipe, frozenset({"methods", *_MAY_CHANGE}))
    if differences and begun:
        _refuse(path, list(differences.values()), can_accept=False)
    return not differences


def _refuse(path: Path, differences: list[str], *, can_accept: bool) -> None:
    begin = paths_begin_in(path)
    elsewhere = begin is not None and begin.is_dir() and not begin.samefile(Path.cwd())
    before = f"Start it in {begin.resolve()} as before, use" if begin is not None and elsewhere else "Use"
    remedy = f"{before} another output directory, or --overwrite to remove what is there"
    there = f"{path.parent}{' is finished and' if (path.parent / RESULTS).exists() else ''} holds another configuration"
    if can_accept:
        remedy += ", or --accept-changes to go on from its last checkpoint all the same"
    listed = "; ".join(differences[:_LISTED])
    more = f"; and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
    raise RunDirectoryError(f"{there}: {listed}{more} ({path.name}). {remedy}")


def finished_results(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What a finished run found, if its directory holds that.

    None where results or model are damaged and the last checkpoint can make them again. Raises RunDirectoryError where
    it cannot. Damaged records are named in a warning: nothing can bring them back.
    """
    path, config = directory / RESULTS, directory / CONFIG
    if not path.exists():
        return None
    if (is_damaged(config) and _says_itself(checkpoints.latest(directory, warn=None))) or _differences(config, recipe):
        return None
    results = read_results(path)  # first, as a file that may not be read is not damaged
    damaged = checkpoints.differing(directory)
    again = [text for name, text in damaged.items() if name == path.name or name.partition("/")[0] == MODEL]
    if results is None and path.name not in damaged:
        again.append(f"{path.name} cannot be read")
    if again:
        listed = f"{directory} is damaged: {'; '.join(again)}"
        if checkpoints.latest(directory) is None:
            raise RunDirectoryError(
                f"{listed}. There is no whole checkpoint to make it again from: restore it, use another output "
                "directory, or --overwrite to remove what is there"
            )
        logger.warning("%s; made again from the last checkpoint", printable(listed))
        return None
    if damaged:
        listed = printable("; ".join(damaged.values()))
        logger.warning("%s: records are damaged, and the results are not: %s", directory, listed)
    return results


def models_of(run: RunConfig) -> dict[str, str]:
    """What tells the models of a run from others at their places, by spec."""
    teachers = run.teachers.values() if run.teachers else [run.teacher]
    return fingerprints([(run.student, run.student_revision), *((spec, run.teacher_revision) for spec in teachers)])


def warn_of_other_models(directory: Path, now: Mapping[str, str]) -> None:
    """Say so where a model is not the one any more that what a directory keeps was made with, as far as is known."""
    try:
        there = records.PROVENANCE.read(directory / records.PROVENANCE).get("models")
    except (OSError, ValueError):
        return
    begin = next(filter(None, (paths_begin_in(directory / name) for name in (CONFIG, records.STUDY_PLAN))), Path())
    then, today = Places(begin, in_full=True), Places(in_full=True)
    known = {then.model(spec): found for spec, found in (there if isinstance(there, dict) else {}).items()}
    for spec in [spec for spec, found in now.items() if known.get(today.model(spec), found) != found]:
        logger.warning(
            "%s is of another model %s: its files have changed since. What is finished stays as it was; for the model "
            "that is there now, use another output directory",
            *(directory, spec),
        )


def finish_ending(directory: Path, args: TRBConfig) -> None:
    """Do what a finished run was killed before it had done: seal it, and remove what was half written."""
    left = [directory / LOCK, *directory.rglob(UNFINISHED)]
    if (directory / CHECKSUMS).exists() and not any(path.exists() for path in left):
        return
    # Whoever holds it ends it; and nothing needs to be done where nothing may be written.
    with suppress(OSError), exclusive(directory):
        remove_unfinished(directory)
        if not (directory / CHECKSUMS).exists():
            seal_run(directory, args)


def read_results(path: Path) -> dict[str, Any] | None:
    """Scores by name in a results.json, or None if it holds none. Raises OSError where it may not be read."""
    try:
        return results if holds_scores(results := RESULTS.read(path)) else None
    except (IsADirectoryError, ValueError):
        return None


def holds_scores(results: dict[str, Any]) -> bool:
    """Whether the contents of a results.json are scores by name."""
    scores = [score for name, score in results.items() if name != "provenance"]
    return bool(scores) and SCORES.fits(scores)


def set_aside(path: Path) -> Path:
    """Move a damaged file or folder out of the way, keeping what can be kept; returns where it is now."""
    aside = records.aside(path)
    remove(aside)
    return path.rename(aside)


def make_again(path: Path) -> None:
    """Move damaged results aside with a warning; the caller computes them anew."""
    logger.warning("%s is damaged; moved to %s, and made again", path, set_aside(path).name)


def clear(directory: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for path in _of_a_run(directory):
        remove(path)


def size_of_run(directory: Path) -> int:
    """Bytes that `clear` would free."""
    files = (file for path in _of_a_run(directory) for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.lstat().st_size for file in files if file.is_file())


def _of_a_run(directory: Path) -> list[Path]:
    saved = [*directory.glob(f"{records.CHECKPOINT_PREFIX}*"), directory / records.CHECKPOINTS_ASIDE]
    return [*saved, *written_by_run(directory)]


def written_by_run(directory: Path) -> list[Path]:
    """The files and folders that a run writes, its checkpoints apart, whether they are there or not."""
    return [directory / name for name in (*_REMOVED, checkpoints.PARTIAL)]


def begin(directory: Path, recipe: Recipe, *, afresh: bool, overwrite: bool) -> None:
    """Claim the directory for a run; without a checkpoint, drop what an interrupted one measured."""
    if overwrite:
        clear(directory)
    checkpoints.unseal(directory)
    for path, read in ((directory / RESULTS, read_results), (directory / CONFIG, _written_recipe)):
        if path.exists() and read(path) is None:
            set_aside(path)
    (directory / RESULTS).unlink(missing_ok=True)
    if afresh:
        for file in records.MEASUREMENTS:
            (directory / file).unlink(missing_ok=True)
        for folder in (EVALUATIONS, SKIPPED):
            shutil.rmtree(directory / folder, ignore_errors=True)
    checkpoints.clear_partial(directory)
    remove_unfinished(directory)
    for file in records.MEASUREMENTS:
        drop_after_step(directory / file, sys.maxsize)  # a kill may have cut the last line off
    described = provenance.write(directory, models_of(recipe.run))  # first: it shows whose the configuration is
    write_configuration(directory / CONFIG, recipe.to_yaml())
    checkpoints.seal(directory, files_of=[directory / CONFIG, described])


def finish_pruning(directory: Path, checkpoint: Path, args: TRBConfig) -> None:
    """Remove what `save_total_limit` leaves over: a kill may have come between a save and that."""
    state = state_of(checkpoint)
    best = checkpoints.best_beside(checkpoint, state.best_model_checkpoint)
    checkpoints.prune(directory, state.global_step, args.save_total_limit, [best])


def listed_methods(directory: Path) -> set[str]:
    """The runs of the comparison that a directory holds, as far as its recipe can be read."""
    try:
        there = parse_yaml((directory / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return set()
    listed = there.get("methods") if isinstance(there, dict) else None
    # "../x" would clear a directory elsewhere.
    return {name for name in (listed if isinstance(listed, dict) else {}) if is_method_name(name)}


def clear_comparison(directory: Path, names: set[str]) -> None:
    for name in names:
        clear(directory / name)
    clear(directory)
    remove(directory / RECIPE)


def named_checkpoint(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_dir():
        raise MissingFileError(f"resume_from_checkpoint is {name!r}, and there is no such directory")
    try:
        Ranks.of_launch().from_first(partial(checkpoints.check_named, path))
    except CheckpointError as error:
        raise RunDirectoryError(f"resume_from_checkpoint is {name!r}: {error}") from error
    return path


def state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / records.TRAINER_STATE))


def is_last(checkpoint: Path, args: TRBConfig) -> bool:
    """Whether nothing is left to train after a checkpoint."""
    state = state_of(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= args.num_train_epochs


@contextmanager
def sole_run(directory: Path, *, what: str = "run", first: bool = True, inside: bool = False) -> Iterator[None]:
    """Keep every other command, also a second start of this one, from writing into a directory, which is made.

    Args:
        directory: of a run, a comparison, a probe, a study or an evaluation.
        what: is refused, if another one is there.
        first: whether this is the first process of its launch; the others hold nothing.
        inside: as in `trb.safety.files.exclusive`.

    Raises RunDirectoryError naming the holder, or where nothing can be written.
    """
    if not first:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(without_what_is_made(directory))
        require_writable(directory)
        try:
            stack.enter_context(exclusive(directory, inside=inside))
        except BlockingIOError as error:
            raise RunDirectoryError(
                f"another {what} is writing to {directory}: {error.strerror}; wait for it, or use another output "
                "directory"
            ) from error
        yield
