"""The pair of the study studies/smollm2: a real language model and a pruned copy of it, which can score.

    python benchmarks/study_pair.py --out runs/pairs/smollm2

SmolLM2-135M-Instruct and its pruned copies do no arithmetic, and a study in which nobody scores says nothing. So both
models learn a task of the zoo (`clock`, written in words) with their own tokenizer and chat template: the teacher on
clean solutions, the student, pruned to a few layers, on solutions whose steps go wrong or leave the task.

Writes OUT/teacher and OUT/student (bfloat16 safetensors and tokenizer), and OUT/training.json: both models' pass@1 on
the study's development problems, settings, commit, versions and machine. Repeats on one machine and build; another GPU
rounds differently. Deliberately not here: distillation, and the test problems.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trb.models.loading import load_model, load_tokenizer
from trb.models.packaged import quiet_libraries
from trb.safety.files import write_json
from trb.studies import provenance
from trb.tasks.evaluation import evaluate
from trb.tasks.prompts import load_prompts
from trb.zoo import TASKS
from trb.zoo.train import Lessons, fit

BASE = "smollm2-135m"
TASK = TASKS["clock"]
SIZES = (2, 10)  # operands of the training problems
MEASURED = {"data": "zoo:clock?operands=8", "split": "test", "seed": 1}  # the study's development problems
LONGEST = 48  # tokens; a solution of eight operands has 42


@dataclass(frozen=True)
class Course(Lessons):
    """What one copy is taught, and how many of the 30 layers it keeps."""

    layers: int


TEACHER = Course(
    name="teacher",
    eos_token="<|im_end|>",
    layers=30,
    steps=200,
    batch_size=64,
    learning_rate=3e-4,
    wrong_step=0.0,
    drift=0.0,
)
STUDENT = replace(TEACHER, name="student", layers=8, steps=400, learning_rate=5e-4, wrong_step=0.1, drift=0.1)


def make(course: Course, out: Path, device: torch.device, problems: int, seed: int) -> dict[str, Any]:
    """Train one copy, write it to `out`, and measure what was written."""
    tokenizer = load_tokenizer(BASE)
    tokenizer.pad_token = tokenizer.pad_token or course.eos_token  # some versions of transformers read none
    model = load_model(BASE, keep_layers=course.layers).to(device)  # type: ignore[arg-type]
    start = time.monotonic()
    for step, loss in enumerate(fit(model, tokenizer, course, TASK, SIZES, steps=course.steps, seed=seed), start=1):
        if step % 20 == 0 or step == course.steps:
            print(f"{course.name}: step {step} of {course.steps}, loss {loss:.3f}", flush=True)
    seconds = time.monotonic() - start
    model.bfloat16().save_pretrained(out / course.name)
    tokenizer.save_pretrained(out / course.name)
    return {
        "parameters": model.num_parameters(),
        "final_loss": loss,
        "train_seconds": round(seconds, 1),
        "measured": measure(model.float().eval(), tokenizer, problems),
        "course": asdict(course),
    }


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: int) -> dict[str, Any]:
    """pass@1 on development problems, one completion each at temperature 1."""
    rows = load_prompts(MEASURED["data"], split=MEASURED["split"], limit=problems, seed=MEASURED["seed"])
    result = evaluate(model, tokenizer, rows, n=1, max_new_tokens=LONGEST, max_rows=problems, progress=False)
    return result.to_dict() | MEASURED


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; made if absent")
    parser.add_argument(
        "--only", choices=("teacher", "student"), help="make one of the two; the other is left as it is"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument(
        "--seed", type=int, default=0, help="seeds the training problems and their mistakes (default 0)"
    )
    parser.add_argument("--problems", type=int, default=512, metavar="N", help="development problems (default 512)")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="multiply both models' steps by X")
    parser.add_argument(
        "--keep", action="store_true", help="keep the models that DIR holds, if taught in this very way"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is asked for and write the record."""
    arguments = parse_arguments(argv)
    quiet_libraries()
    path = arguments.out / "training.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for course in (TEACHER, STUDENT):
        course = replace(course, steps=max(1, round(course.steps * arguments.steps_scale)))
        wanted = {"course": asdict(course), "seed": arguments.seed}
        kept = arguments.keep and {key: record.get(course.name, {}).get(key) for key in wanted} == wanted
        if kept or arguments.only not in (None, course.name):
            continue
        result = make(course, arguments.out, torch.device(arguments.device), arguments.problems, arguments.seed)
        # Read again: teacher and student may be made side by side.
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        record[course.name] = result | wanted | {"provenance": provenance.describe()}
        write_json(path, record)
        measured = result["measured"]
        low, high = measured["interval"]
        print(f"{course.name}: pass@1 {measured['pass_at_1']:.1%} ({low:.1%} to {high:.1%})", flush=True)


if __name__ == "__main__":
    main()
