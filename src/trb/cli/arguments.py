"""What the arguments of all commands share: help that teaches, and examples that run.

Left out: what a command does, and the keys of recipes, which are options too (`trb.studies.keys`).
"""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

from trb.studies.shipped import recipe_names

__all__ = ["EXAMPLES", "add_command"]

_OVERRIDES = """\
Every key of the recipe is also an option: --learning-rate 3e-5, --max_steps=50, --bf16, --no-bf16,
--methods.trb.initial_kl_budget 0.1. `trb train --help-keys` lists them with their defaults."""

EXAMPLES = {
    "": """\
    trb init
    trb compare --config quickstart
    trb train --config qwen3-1.7b-from-8b --output-dir runs/qwen3
    trb eval --model runs/qwen3 --data math500 gsm8k --samples 4
    trb sweep --config studies/zoo --workers 2
    trb report runs/qwen3
    trb doctor --config qwen3-1.7b-from-8b""",
    "init": """\
    trb init
    trb init long.yaml --student zoo:student --teacher zoo:teacher --data zoo:chains?operands=8
    trb init told.yaml --student zoo:student --teacher base --data zoo:chains?told=0.5 --lora-rank 8
    trb init qwen3.yaml --student Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-4B --data openai/gsm8k:main""",
    "train": """\
    trb train --config baselines/trb
    trb train --config baselines/trb --output-dir runs/try --initial-kl-budget 0.1 --seed 1
    trb train --help-keys""",
    "compare": """\
    trb compare --config quickstart --output-dir runs/quickstart
    trb compare --config quickstart --max-steps 20 --methods.trb.blend_warmup_steps 10""",
    "eval": """\
    trb eval --model zoo:student --data zoo:chains --limit 200
    trb eval --model runs/quickstart/trb --data zoo:chains --samples 4 --output-dir runs/eval
    trb eval --model Qwen/Qwen3-1.7B --data math500 --chat-template-kwargs '{"enable_thinking": false}'
    trb eval --model Qwen/Qwen3-1.7B-Base --data math500 aime24=aime24.jsonl --dtype auto""",
    "sweep": """\
    trb sweep --config studies/zoo --plan
    trb sweep --config studies/zoo --output-dir runs/study --workers 2
    trb sweep --config studies/self-setting --methods opd trb sequence-linear --seeds 8 --plan
    trb sweep --config studies/self-setting --seeds 20-27 --plan
    trb sweep --config studies/paper --output-dir /shared/study --ray auto --gpus 1""",
    "probe": """\
    trb probe --config quickstart
    trb probe --config quickstart --model runs/quickstart/opd --output-dir runs/probe-opd
    trb probe --config studies/zoo --setting clock --budgets 0 0.1 0.5 inf --problems 256""",
    "report": """\
    trb report runs/quickstart
    trb report runs/study --export runs/study/paper""",
    "doctor": """\
    trb doctor
    trb doctor --student zoo:student --teacher zoo:teacher
    trb doctor --config qwen3-1.7b-from-8b --launch accelerate/fsdp2
    trb doctor --config smollm2
    trb doctor --plan --config qwen3-1.7b-from-8b --machine h100 --gpus 8 --strategy fsdp""",
}


def add_command(
    commands: Any,
    name: str,
    text: str,
    function: Callable[[argparse.Namespace, list[str]], int],
    *,
    overrides: bool = False,
    recipes: bool = False,
) -> argparse.ArgumentParser:
    """A command with its examples; `overrides` and `recipes` say what --config and the other options of it may be."""
    parts = [*([_OVERRIDES] if overrides else []), *([_recipes()] if recipes else []), f"examples:\n{EXAMPLES[name]}"]
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:].replace("%%", "%") + ".",
        epilog="\n\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.set_defaults(
        command=function, takes_overrides=overrides, no_overrides="", hint="Run the same command again."
    )
    return parser


def _recipes() -> str:
    """What --config may be."""
    names = textwrap.fill(", ".join(recipe_names()), 100, initial_indent="    ", subsequent_indent="    ")
    return (
        f"recipes and studies of the package, by name:\n{names}\n"
        "A name never means a file here: write a file of yours with its ending (mine.yaml) or as a path (./mine).\n"
        "Paths in it are looked for beside it, then in the current directory; output goes to the current directory."
    )
