"""The pairs of benchmarks/map.py: a student right in a given share of its steps, a teacher that gives up or does not.

    python benchmarks/map_pairs.py runs/map/pairs --stages 8 --start 0.45

The student writes the right result with probability `start` at every step, else most often one rival of it, and goes on
as if nothing had happened; after one step in twenty it gives up. The teacher is right at every step. After a wrong one
it has learned to write a question mark, wherever it stands, and to stop ("gives-up"); or it has never seen one and does
what it does ("unaware").

Models are kept in a folder by their knobs and made where they are missing, each in half a minute on one core, a teacher
that gives up in two. Repeats on one machine and build. Deliberately not here: distillation.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trb.safety.files import write_json
from trb.studies import provenance
from trb.zoo.staged import ENTRIES, GIVE_UP, Staged
from trb.zoo.tokenizer import END_OF_TEXT, END_OF_TURN, VOCABULARY, character_tokenizer
from trb.zoo.train import Recipe, build_model, learning_rate_factor, prompt_ids

QUITS = 0.05  # after every step; what a student never does, the reverse KL does not teach it
ENDINGS = ("gives-up", "unaware")
_NOTHING = -100  # aim of positions that teach nothing: prompt and padding
_DIGITS = torch.tensor([VOCABULARY[digit] for digit in "0123456789"])

STUDENT = Recipe(
    name="student",
    eos_token=END_OF_TEXT,
    family="llama",
    layers=2,
    hidden_size=64,
    intermediate_size=256,
    head_rows=64,
    tied=False,  # tied heads learn the tables several times more slowly
    steps=150,
    batch_size=64,
    learning_rate=3e-3,
    wrong_step=0.0,
    drift=0.0,
)
MISTAKES = replace(STUDENT, steps=100)  # lessons that follow those
TEACHER = replace(STUDENT, name="teacher", eos_token=END_OF_TURN, hidden_size=96, intermediate_size=384, head_rows=80)
WARY_TEACHER = replace(TEACHER, steps=1200)  # telling right from wrong takes longer
WARY_SHARPNESS = 2.0  # at its own temperature it takes one right solution in four for a wrong one


@dataclass(frozen=True)
class Knobs:
    """What makes a pair."""

    stages: int = 8
    start: float = 0.45
    """The student's probability of a right step."""
    shared: float = 0.0
    """Share of the stages that use one table."""
    teacher: str = "gives-up"

    def __post_init__(self) -> None:
        if self.teacher not in ENDINGS:
            raise ValueError(f"teacher is {self.teacher!r}; choose one of {', '.join(ENDINGS)}")
        if not 0.1 <= self.start < 1:
            raise ValueError(f"start is {self.start}; give a probability from 0.1, which is chance, to below 1")

    @property
    def task(self) -> Staged:
        return Staged(self.shared)

    @property
    def data(self) -> str:
        """The spec of its problems."""
        return f"zoo:staged?stages={self.stages}&shared={self.shared:g}"


@dataclass(frozen=True)
class Pair:
    """Directories of the two models; training.json beside each says how it was made."""

    student: Path
    teacher: Path


def ready(knobs: Knobs, folder: Path, say: Callable[[str], None] = lambda text: None, scale: float = 1.0) -> Pair:
    """The pair of some knobs, its models made where `folder` lacks them; `scale` multiplies the steps of lessons."""
    table = f"{knobs.stages}-stages-{knobs.shared:g}-shared"
    clean, student = folder / f"student-{table}-clean", folder / f"student-{table}-{knobs.start:g}"
    teacher = folder / f"teacher-{table}-{knobs.teacher}"
    keep = partial(_keep, say=say, scale=scale)
    keep(clean, STUDENT, Lessons(replace(knobs, start=Knobs.start, teacher=Knobs.teacher)))  # one for all of them
    keep(
        student,
        MISTAKES,
        Lessons(replace(knobs, teacher=Knobs.teacher), wrong=1 - knobs.start, hesitates=True, quits=QUITS),
        clean,
    )
    if knobs.teacher == "gives-up":
        lessons = Lessons(replace(knobs, start=Knobs.start), wrong=0.2, clean=0.5, gives_up=True)
        keep(teacher, WARY_TEACHER, lessons, sharpness=WARY_SHARPNESS)
    else:
        keep(teacher, TEACHER, Lessons(replace(knobs, start=Knobs.start)))
    return Pair(student, teacher)


# ---- lessons ----


@dataclass(frozen=True)
class Lessons:
    """Solutions with wrong steps, and what a model should say at each of their positions."""

    knobs: Knobs
    wrong: float = 0.0
    """Probability that a step of the solution is wrong; the next step follows from what is written."""
    hesitates: bool = False
    """Whether results should have the student's law (`hesitation`), and not certainty."""
    clean: float = 0.0
    """Share of the solutions that have no wrong step."""
    quits: float = 0.0
    """Probability that a solution is given up after a step, whatever went before."""
    gives_up: bool = False
    """Whether it should give up from the first wrong result on."""

    def example(self, rng: random.Random, split: str = "train") -> tuple[str, str, str]:
        """A problem, what is written, and what should be: a character (or the box) of one for each of the other."""
        task = self.knobs.task
        problem = task.draw(rng, self.knobs.stages, split)
        state, operations = task.start(problem)
        head = "\\boxed{"
        written, aim, dead = "", "", False
        wrong = 0.0 if rng.random() < self.clean else self.wrong
        for operation in operations:
            right = task.step(state, operation)
            step = task.wrong_step(state, operation, rng) if rng.random() < wrong else right
            state = step.state
            written += step.text
            aim += GIVE_UP * len(right.text) if dead and self.gives_up else right.text
            dead = dead or step != right
            if rng.random() < self.quits:
                return problem, head + written + GIVE_UP, head + aim + GIVE_UP
        return problem, f"{head}{written}}}", head + aim + (GIVE_UP if dead and self.gives_up else "}")

    def batch(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
        """Token ids and aims, both [rows, longest]; the aim at a position is what should stand there."""
        ids, aims = [], []
        for _ in range(rows):
            problem, *texts = self.example(rng)
            prompt = prompt_ids(tokenizer, problem)
            written, aim = map(tokenizer.encode, texts)
            if self.gives_up and aim[-1] == VOCABULARY[GIVE_UP]:  # anywhere after the wrong step, and it stops
                cut = rng.randrange(aim.index(VOCABULARY[GIVE_UP]), len(aim))
                written, aim = [*written[:cut], VOCABULARY[GIVE_UP]], aim[: cut + 1]
            stop = [tokenizer.eos_token_id]
            ids.append(torch.tensor([*prompt, *written, *stop]))
            aims.append(torch.tensor([_NOTHING] * len(prompt) + [*aim, *stop]))
        pad = torch.nn.utils.rnn.pad_sequence
        return (
            pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad(aims, batch_first=True, padding_value=_NOTHING),
        )

    def loss(self, logits_BTV: Tensor, ids: Tensor, aims: Tensor) -> Tensor:
        """Cross-entropy to the aims; at results, to the student's law if that is asked for."""
        log_probs = F.log_softmax(logits_BTV.flatten(0, 1), -1)
        wanted = -log_probs.gather(-1, aims[:, 1:].flatten().clamp_min(0)[:, None])[:, 0]
        if self.hesitates:
            stage = ids[:, :-1].roll(1, dims=1).flatten() - VOCABULARY["a"]
            entry = ids[:, :-1].flatten() - VOCABULARY["0"]
            law = hesitation(self.knobs)
            result = (aims[:, 1:].flatten() >= 0) & (stage >= 0) & (stage < len(law)) & (entry >= 0) & (entry < 10)
            wanted[result] = -(law[stage[result], entry[result]] * log_probs[result][:, _DIGITS]).sum(-1)
        return wanted[aims[:, 1:].flatten() != _NOTHING].mean()


@cache
def hesitation(knobs: Knobs) -> Tensor:
    """`[stages, entries, 10]` law of the student's results: each entry of a table has to be learned by itself.

    The right result has a rival, another digit that is as likely, and the eight others share the rest: were the student
    only made surer of what it thinks, it would not be right more often. Where that cannot reach `start`, some entries
    of every table are known.
    """
    entries = len(ENTRIES)
    known = next(n for n in range(entries) if (knobs.start * entries - n) / (entries - n) <= 0.5)
    right = (knobs.start * entries - known) / (entries - known)
    law = torch.full((knobs.stages, entries, 10), (1 - 2 * right) / 8)
    for place, stage in enumerate(ascii_lowercase[: knobs.stages]):
        table = knobs.task.table(stage)
        rng = random.Random(f"rivals:{table}")
        for rank, entry in enumerate(rng.sample(range(entries), entries)):
            result = int(table[entry])
            rival = rng.choice([digit for digit in range(10) if digit != result])
            if rank < known:
                law[place, entry] = torch.eye(10)[result]
            else:
                law[place, entry, [result, rival]] = right
    return law


def _fit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, lessons: Lessons, steps: int
) -> Iterator[float]:
    rng = random.Random(f"{recipe.name}:{lessons}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * learning_rate_factor(step, steps)
        ids, aims = lessons.batch(tokenizer, rng, recipe.batch_size)
        loss = lessons.loss(model(input_ids=ids[:, :-1]).logits, ids, aims)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def _keep(
    directory: Path,
    recipe: Recipe,
    lessons: Lessons,
    before: Path | None = None,
    *,
    sharpness: float = 1.0,
    say: Callable[[str], None],
    scale: float,
) -> None:
    """Make a model where it is missing, from scratch or from that in `before`; `sharpness` multiplies its logits.

    Raises ValueError for one that was taught in another way: what was trained from it would not say so.
    """
    began, steps = time.process_time(), max(1, round(recipe.steps * scale))
    taught = {"lessons": asdict(lessons), "recipe": asdict(recipe) | {"steps": steps}, "sharpness": sharpness}
    if (path := directory / "training.json").exists():
        if any(json.loads(path.read_text()).get(key) != value for key, value in taught.items()):
            raise ValueError(f"{directory} was taught in another way; remove it, and what was trained from it")
        return
    tokenizer = character_tokenizer(lessons.knobs.task, eos_token=recipe.eos_token, pad_token=END_OF_TEXT)
    torch.manual_seed(0)
    model = build_model(recipe, tokenizer) if before is None else AutoModelForCausalLM.from_pretrained(before)
    for step, loss in enumerate(_fit(model, tokenizer, recipe, lessons, steps), start=1):
        if step % 25 == 0 or step == steps:
            say(f"{directory.name}: step {step} of {steps}, loss {loss:.3f}")
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    record = {
        "measured": measure(model.eval(), tokenizer, lessons.knobs),
        "final_loss": loss,
        "processor_seconds": round(time.process_time() - began, 1),
        "parameters": model.num_parameters(),
        **taught,
        "provenance": provenance.describe(),
    }
    write_json(partial / "training.json", record)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    say(f"{directory.name}: {record['measured']}")


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, knobs: Knobs, rows: int = 256
) -> dict[str, float]:
    """Probability of a right result after right steps, mean and lowest stage, and of giving up after wrong ones."""
    lessons, rng, gives_up = Lessons(knobs, wrong=0.2, gives_up=True), random.Random("measure"), []
    for _ in range(rows):
        problem, written, aim = lessons.example(rng, "test")
        prompt, ids, aims = prompt_ids(tokenizer, problem), tokenizer.encode(written), tokenizer.encode(aim)
        logits = model(input_ids=torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        gives_up.append(logits.softmax(-1)[torch.tensor(aims) == VOCABULARY[GIVE_UP], VOCABULARY[GIVE_UP]])
    right = stage_rates(model, tokenizer, knobs, rows)["right"]
    found = {
        "right_step": sum(right) / len(right),
        "lowest_stage": min(right),
        "gives_up": torch.cat(gives_up).mean().item(),
    }
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def stage_rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, knobs: Knobs, rows: int = 256
) -> dict[str, list[float]]:
    """Stage by stage, after right steps: the probability of the right result, and that of giving up before it."""
    tokens, ends = _solutions(tokenizer, knobs, rows)
    probabilities = model(input_ids=tokens[:, :-1]).logits.softmax(-1)
    right = [probabilities[:, at + 1].gather(-1, tokens[:, at + 2, None]).mean().item() for at in ends]
    gives_up = [probabilities[:, at - 1, VOCABULARY[GIVE_UP]].mean().item() for at in ends]
    return {"right": [round(value, 4) for value in right], "gives_up": [round(value, 4) for value in gives_up]}


@torch.no_grad()
def lost_lookups(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    knobs: Knobs,
    rows: int = 256,
) -> list[dict[str, Any]]:
    """The entries of stages that a student gets wrong more often than not, though all before them is right.

    Of each: how probable the right result is, what is likelier and how probable that is (means over prefixes), and the
    teacher's mean log-probability of it. What no test problem asks for is left out.
    """
    tokens, ends = _solutions(tokenizer, knobs, rows)
    student_RTV, teacher_RTV = (one(input_ids=tokens[:, :-1]).logits.log_softmax(-1) for one in (model, teacher))
    lost = []
    for stage, at in enumerate(ends):
        for entry in ENTRIES:
            chosen_R = tokens[:, at + 1] == VOCABULARY[entry]
            if not chosen_R.any():
                continue  # few stages have few test problems
            law_V = student_RTV[chosen_R, at + 1].exp().mean(0)
            right, likeliest = tokens[chosen_R, at + 2][0], law_V.argmax()
            if law_V[right] < 0.5:
                lost.append(
                    {
                        "lookup": ascii_lowercase[stage] + entry,
                        "right": float(f"{law_V[right].item():.3g}"),
                        "instead": tokenizer.decode([likeliest]),
                        "probability": round(law_V[likeliest].item(), 4),
                        "teacher_log_prob": round(teacher_RTV[chosen_R, at + 1, likeliest].mean().item(), 2),
                    }
                )
    return lost


def _solutions(tokenizer: PreTrainedTokenizerFast, knobs: Knobs, rows: int) -> tuple[Tensor, range]:
    """Right solutions of test problems [rows, tokens], and the places where a stage's letter stands in all of them."""
    rng, task, ids = random.Random("stages"), knobs.task, []
    for _ in range(rows):
        problem = task.draw(rng, knobs.stages, "test")
        ids.append(prompt_ids(tokenizer, problem) + tokenizer.encode(task.solution(problem)))
    tokens = torch.tensor(ids)  # all of one length
    return tokens, range(tokens.shape[1] - 1 - 3 * knobs.stages, tokens.shape[1] - 1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models are kept")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--start", type=float, default=0.45, help="the student's rate of right steps")
    parser.add_argument("--shared", type=float, default=0.0, help="share of stages with one table")
    parser.add_argument("--teacher", choices=ENDINGS, default="gives-up", help="what it says after a wrong step")
    knobs: dict[str, Any] = vars(parser.parse_args())
    torch.set_num_threads(1)
    ready(Knobs(**{name: value for name, value in knobs.items() if name != "folder"}), knobs["folder"], print)


if __name__ == "__main__":
    main()
