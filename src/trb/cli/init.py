"""`trb init`: a short recipe for a pair and a data set, with a reason beside each value, that runs as it is.

Left out: what the values are (`trb.cli.draft`), and overwriting anything.
"""

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trb.errors import InputError
from trb.safety.files import make_folder
from trb.safety.untrusted import printable

if TYPE_CHECKING:
    from trb.cli.draft import Line

__all__ = ["OPTIONS", "add_init", "run_init"]

EMBEDDED = {"student": "zoo:student", "teacher": "zoo:teacher", "data": "zoo:chains"}

# What a recipe's keys are called here, where messages name them.
OPTIONS = {
    "train_prompt_column": "--prompt-column",
    "train_answer_column": "--answer-column",
    "lora_rank": "--lora-rank",
}


def add_init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # Not the name under which runs keep theirs: a folder with that would look like a run's.
    add("file", nargs="?", default="distil.yaml", metavar="FILE", help="the recipe to write (default: distil.yaml)")
    add("--student", metavar="SPEC", help="model to train: zoo:student, smollm2-135m, a directory or a hub id")
    add("--teacher", metavar="SPEC", help="model to learn from, with the same tokenizer")
    add("--data", metavar="SPEC", help="prompts: zoo:chains, reasoning-gym:TASK, a .jsonl or .parquet file, a hub name")
    add("--prompt-column", metavar="NAME", help="column of the data with the prompt, if not guessed right")
    add("--answer-column", metavar="NAME", help="column of the data with the answer, if not guessed right")
    add(
        "--lora-rank",
        type=int,
        default=0,
        metavar="R",
        help="train adapters of this rank, as a teacher on the student's own weights needs (--teacher base)",
    )


def run_init(arguments: argparse.Namespace, rest: list[str]) -> int:
    path = Path(arguments.file)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"{path} would not be read as a recipe: give it a name that ends in .yaml")
    _refuse_to_overwrite(path)
    given = {name: value for name in EMBEDDED if (value := getattr(arguments, name))}
    missing = [f"--{name}" for name in EMBEDDED if name not in given]
    if given and missing:
        raise InputError(f"{' and '.join(missing)} missing: name the pair and the data, or none of the three")

    from trb.cli.draft import draft
    from trb.errors import calls
    from trb.models.packaged import quiet_libraries
    from trb.studies.keys import RunConfig

    quiet_libraries()
    spec = given or EMBEDDED
    with calls(OPTIONS):
        run = RunConfig(
            *(spec["student"], spec["teacher"], spec["data"]),
            train_prompt_column=arguments.prompt_column,
            train_answer_column=arguments.answer_column,
            lora_rank=arguments.lora_rank,
        )
        paragraphs = draft(run)
    text = _text(path, [[_seen_from(path.parent, line) for line in lines] for lines in paragraphs if lines])
    make_folder(path.parent, "choose another FILE")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _refuse_to_overwrite(path)
    shown, typed = printable(str(path), lines=False), _typed(path)
    print(f"{shown} is written. Next:\n  trb doctor --config {typed}\n  trb train --config {typed}")
    return 0


def _typed(path: Path) -> str:
    """A path as a shell reads it."""
    return shlex.quote(printable(str(path), lines=False))


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise InputError(f"{path} is there already and stays as it is: name another file, as in trb init second.yaml")


def _seen_from(folder: Path, line: "Line") -> "Line":
    """A path that was given here, as the recipe has it: relative to the recipe."""
    here = line.key in ("student", "teacher", "train_data") and os.path.exists(line.value)
    if not here or os.path.isabs(line.value) or folder.absolute() == Path.cwd():
        return line
    return line._replace(value=os.path.relpath(line.value, folder))


def _text(path: Path, paragraphs: Sequence[Sequence["Line"]]) -> str:
    """The file: what it is for, how it is used, and its keys with the reasons beside them."""
    name = _typed(path)
    head = (
        "# A first recipe, written by `trb init` from the pair and the data; change whatever you like.\n"
        f"#\n#   trb doctor --config {name}    checks the pair, the lengths and the memory\n"
        f"#   trb train --config {name}     writes runs/{path.stem}/report.html\n"
        "#\n# Every other key, with its default: trb train --help-keys\n"
    )
    written = [[(_entry(line.key, line.value), line.why) for line in lines] for lines in paragraphs]
    width = max(len(entry) for lines in written for entry, why in lines if why and len(entry) <= 44)
    blocks = [[f"{entry:<{width}}  # {why}\n" if why else f"{entry}\n" for entry, why in lines] for lines in written]
    return "\n".join([head, *map("".join, blocks)])


def _entry(key: str, value: Any) -> str:
    import yaml

    from trb.studies.yaml_files import Dumper

    return yaml.dump({key: value}, Dumper=Dumper, width=math.inf, allow_unicode=True).rstrip("\n")
