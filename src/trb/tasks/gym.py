"""The tasks of reasoning-gym: their rows, two splits that share no problem, and scorers that are worth asking.

Left out: running a scorer on what a model wrote, which is for the confined worker of `trb.tasks.grading`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

from trb.errors import InputError, PackageError, nearest
from trb.tasks.answers import Row, encode_metadata
from trb.tasks.sources import REASONING_GYM, task_settings

__all__ = [
    "WorthlessScorerError",
    "check_scorer",
    "full_marks",
    "import_reasoning_gym",
    "reasoning_gym_rows",
]

SPLITS = ("train", "test")
# One problem in so many belongs to the test split. Most are drawn for training, and some tasks have few in all.
_TEST_SHARE = 4
_DRAWS = 20  # for each row that is asked for, before a split is given up: five times what a test split should take
# Answers that no problem deserves, unless one is spelt like its reference.
NONSENSE = ("", "zzzz", "nan", "inf")


def reasoning_gym_rows(spec: str, split: str, n: int, seed: int) -> list[Row]:
    """`n` rows of a task; problems may repeat, and none is in both splits, whatever the seeds.

    Raises ValueError for an unknown task, setting or split, for a task with too few problems, and for one whose scorer
    tells nothing (`check_scorer`).
    """
    task, _, query = spec.removeprefix(REASONING_GYM).partition("?")
    gym = import_reasoning_gym()
    registry = gym.factory.DATASETS
    if task not in registry:
        raise InputError(f"unknown reasoning-gym task {task!r}{nearest(task, registry)}")
    if split not in SPLITS:
        raise InputError(f"{spec!r} has no split {split!r}; choose one of {', '.join(SPLITS)}")
    settings = task_settings(spec, query, {field.name for field in fields(registry[task][1])})

    def dataset(size: int) -> Any:
        return gym.create_dataset(task, seed=_generator_seed(seed, split), size=size, **settings)

    try:
        entries = _entries(spec, split, n, dataset)
        check_scorer(task, dataset(n).score_answer, entries[0])
    except InputError:
        raise
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"reasoning-gym refuses {spec!r}: {error}") from error
    return [
        {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "verifier": REASONING_GYM + task,
            "metadata": encode_metadata({"task": task, "settings": settings, "entry": entry}),
        }
        for entry in entries
    ]


def import_reasoning_gym() -> ModuleType:
    """The `reasoning_gym` module; ImportError names the extra that installs it."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise PackageError(f"reasoning-gym tasks need the extra package ({error}): pip install 'trb[tasks]'") from error
    return reasoning_gym


# ---- splits ----


def split_of(question: str) -> str:
    """The split of a problem: a hash of its text, as in the zoo. Another seed alone would draw many problems again."""
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


def _entries(spec: str, split: str, n: int, dataset: Callable[[int], Any]) -> list[Row]:
    """The first `n` problems of a split."""
    found: list[Row] = []
    most = _DRAWS * (n + 10)
    drawn = 0
    while len(found) < n and drawn < most:
        size = drawn + max(n, 16)
        problems = dataset(size)
        while len(found) < n and drawn < size:
            entry = problems[drawn]
            drawn += 1
            if split_of(entry["question"]) == split:
                found.append(entry)
    if len(found) < n:
        raise InputError(
            f"{spec!r} has too few different problems: of {drawn} that were drawn {len(found)} belong to its {split} "
            f"split, and {n} are wanted; ask for fewer rows, or give the task settings with more problems"
        )
    return found


def _generator_seed(seed: int, split: str) -> int:
    """A 31-bit generator seed. Hashed because the generator adds the row index to it: neighbouring seeds, and
    the splits of one seed, would otherwise share all but a few of their problems."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:4], "big") >> 1


# ---- scorers ----


class WorthlessScorerError(InputError):
    """A task whose own scorer cannot tell answers apart."""


def full_marks(score: Any) -> bool:
    """Whether a task's scorer is content; what is no number, nan among it, is no mark."""
    return bool(score >= 1.0)


def check_scorer(task: str, scorer: Callable[[str, Row], Any], entry: Row) -> None:
    """Raises WorthlessScorerError where the scorer of a task gives full marks to what no problem deserves."""
    reference = str(entry["answer"]).strip().casefold()
    for answer in NONSENSE:
        if answer != reference and _is_content(scorer, answer, entry):
            raise WorthlessScorerError(
                f"reasoning-gym's own scorer of {task!r} gives full marks to the answer {answer!r}, so that its scores "
                "mean nothing; choose another task, or keep its prompts in a file without the column 'verifier'"
            )


def _is_content(scorer: Callable[[str, Row], Any], answer: str, entry: Row) -> bool:
    try:
        return full_marks(scorer(answer, entry))
    except Exception:  # scorers parse the answer, and some raise on nonsense
        return False
