"""The pairs of the zoo: what each of their models is, and what it is taught.

Left out: teaching (`trb.zoo.train`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerFast

from trb.zoo import TASKS
from trb.zoo.tasks import Task
from trb.zoo.tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    calling_tokenizer,
    character_tokenizer,
    word_piece_tokenizer,
)

__all__ = ["PAIRS", "Lessons", "Pair", "Recipe"]


@dataclass(frozen=True)
class Lessons:
    """What a model is taught, whatever its architecture."""

    name: str
    eos_token: str
    steps: int
    batch_size: int
    learning_rate: float
    wrong_step: float
    """Probability that a step's result is wrong in a training solution."""
    drift: float
    """Probability that a training solution leaves the task at a step."""
    told: float = field(default=0.0, kw_only=True)
    """Share of training problems that are told: their prompt has the worked solution, and what is to be written is that
    solution, without a fault."""


@dataclass(frozen=True)
class Recipe(Lessons):
    """Everything that distinguishes one model of a pair from the other."""

    layers: int
    hidden_size: int
    intermediate_size: int
    head_rows: int
    """Rows of the output head; padded beyond the vocabulary, differently in the two models."""
    tied: bool
    family: str = "qwen3"
    from_shipped: bool = False
    """Go on from the shipped model of that name, instead of from random weights."""
    base: str = ""
    """The shipped model to go on from, where it has another name."""


@dataclass(frozen=True)
class Pair:
    """A student, a teacher, and the task and vocabulary they share; or one model that is to be both."""

    task: Task
    tokenizer: Callable[..., PreTrainedTokenizerFast]
    trained_sizes: tuple[int, int]
    """Smallest and largest problem in the training data."""
    measured_sizes: tuple[int, ...]
    models: tuple[Recipe, ...]


_STUDENT = Recipe(
    name="student",
    layers=2,
    hidden_size=96,
    intermediate_size=256,
    head_rows=64,
    tied=True,
    eos_token=END_OF_TEXT,
    steps=1000,
    batch_size=64,
    learning_rate=2e-3,
    wrong_step=0.25,
    drift=0.25,
)
_TEACHER = Recipe(
    name="teacher",
    layers=3,
    hidden_size=128,
    intermediate_size=384,
    head_rows=80,
    tied=False,
    eos_token=END_OF_TURN,
    steps=1500,
    batch_size=64,
    learning_rate=2e-3,
    wrong_step=0.0,
    drift=0.0,
)

# Tied heads learn programs several times more slowly.
_SMALL_STUDENT = replace(_STUDENT, family="llama", hidden_size=64, head_rows=176, tied=False, learning_rate=5e-3)

PAIRS = {
    # The pair that ships.
    "chains": Pair(TASKS["chains"], character_tokenizer, (2, 8), (4, 6, 8), (_STUDENT, _TEACHER)),
    # Longer chains and a student that leaves the task at one step in ten: the study's first setting.
    "long-chains": Pair(
        TASKS["chains"],
        character_tokenizer,
        (2, 12),
        (8, 10, 12),
        (
            replace(_STUDENT, from_shipped=True, steps=400, batch_size=32, wrong_step=0.1, drift=0.1),
            replace(_TEACHER, from_shipped=True, steps=500, batch_size=32, learning_rate=1e-3),
        ),
    ),
    # One model for both, which also ships: with the worked solution in its prompt it writes it down, and teaches
    # itself.
    "told": Pair(
        TASKS["chains"],
        character_tokenizer,
        (2, 8),
        (4, 6, 8),
        (replace(_STUDENT, name="told", from_shipped=True, base="student", steps=1200, batch_size=32, told=0.5),),
    ),
    # Another task, model family, size and vocabulary: the study's second setting.
    "clock": Pair(
        TASKS["clock"],
        word_piece_tokenizer,
        (2, 12),
        (8, 10, 12),
        (
            replace(
                _STUDENT,
                family="llama",
                layers=3,
                hidden_size=112,
                intermediate_size=320,
                head_rows=192,
                wrong_step=0.1,
                drift=0.1,
            ),
            replace(_TEACHER, family="llama", hidden_size=144, intermediate_size=432, head_rows=200, steps=1000),
        ),
    ),
    # Models that call a calculator between their turns, which also ship.
    "caller": Pair(
        TASKS["sums"],
        calling_tokenizer,
        (2, 4),
        (2, 3, 4),
        (
            replace(
                _STUDENT,
                name="caller-student",
                hidden_size=48,
                intermediate_size=128,
                head_rows=72,
                eos_token=END_OF_TURN,
                steps=800,
                batch_size=32,
                learning_rate=4e-3,
                wrong_step=0.2,
                drift=0.2,
            ),
            replace(
                _TEACHER,
                name="caller-teacher",
                layers=2,
                hidden_size=64,
                intermediate_size=192,
                steps=1000,
                batch_size=32,
                learning_rate=3e-3,
            ),
        ),
    ),
    # Expressions of Python, tried on inputs: the study of code.
    "programs": Pair(
        TASKS["programs"],
        word_piece_tokenizer,
        (2, 6),
        (4, 5, 6),
        (
            replace(_SMALL_STUDENT, steps=600, wrong_step=0.03, drift=0.05),
            replace(_TEACHER, family="llama", layers=2, hidden_size=96, head_rows=192, steps=800, learning_rate=3e-3),
        ),
    ),
    # Conversations, whose last turn is measured here: the study of dialogue.
    "dialogue": Pair(
        TASKS["dialogue"],
        word_piece_tokenizer,
        (2, 6),
        (4, 5, 6),
        (
            replace(_SMALL_STUDENT, steps=500, wrong_step=0.1, drift=0.1),
            replace(_TEACHER, family="llama", layers=3, hidden_size=96, head_rows=192, steps=1500, learning_rate=3e-3),
        ),
    ),
}
