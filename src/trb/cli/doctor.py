"""`trb doctor`: whether this machine, and a pair of models, can do what a recipe asks.

Every check prints a line; one that fails makes the exit code 1. Weights are not read but for adapters: shapes, ids and
templates say enough. Left out: how models are read token by token, which takes weights (`trb.sampling.reading` finds
out before the first sample), and machines that are not at hand (`trb.cli.plan`).
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import trb
from trb.cli.display import message, new_console
from trb.cli.outline import outlined_pairs
from trb.errors import InputError
from trb.safety.untrusted import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trb.studies.keys import RunConfig
    from trb.studies.recipe import Recipe
    from trb.training.config import TRBConfig


class Check(NamedTuple):
    """One line of `trb doctor`."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    text: str
    remedy: str = ""


class Launch(NamedTuple):
    """How many processes share a run, and how they train: a strategy of `trb.planning`."""

    processes: int = 1
    strategy: str = "ddp"

    @property
    def sharded(self) -> bool:
        return self.strategy != "ddp"


def add_doctor(parser: argparse.ArgumentParser) -> None:
    from trb.cli.plan import add_plan_arguments

    parser.add_argument("--config", metavar="RECIPE", help="check the pair, lengths and batch of this recipe")
    parser.add_argument("--student", metavar="SPEC", help="with --teacher: check this pair")
    parser.add_argument("--teacher", metavar="SPEC", help="with --student: check this pair")
    parser.add_argument(
        "--launch",
        metavar="FILE",
        help="estimate memory for these settings of `accelerate launch`: a file, or accelerate/ddp, fsdp2 or zero3",
    )
    add_plan_arguments(parser)


def run_doctor(arguments: argparse.Namespace, rest: list[str]) -> int:
    from rich.text import Text

    from trb.models.packaged import quiet_libraries
    from trb.studies.keys import parse_overrides
    from trb.studies.recipe import load_recipe, make_recipe
    from trb.studies.shipped import recipe_file
    from trb.studies.yaml_files import read_yaml

    options = {name: value for name in ("student", "teacher") if (value := getattr(arguments, name))}
    options |= parse_overrides(rest)
    recipe = None
    if arguments.config:
        quiet_libraries()
        recipe = load_recipe(arguments.config, options)
    elif options:
        recipe = make_recipe({"train_data": "none"}, options, source="options")
    launch = None if arguments.launch is None else read_yaml(recipe_file(arguments.launch, launches=True))
    if arguments.plan:
        from trb.cli.plan import run_plan

        if recipe is None:
            raise InputError("--plan needs a recipe (--config) or a pair (--student and --teacher)")
        return run_plan(recipe, arguments)
    console, failed = new_console(), False
    for check in _checks(recipe, launch):
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.status]
        remedy = f". {check.remedy}" if check.remedy else ""
        line = Text.assemble(
            (f"{check.status:<5}", style), f"{check.subject}: {printable(check.text)}{printable(remedy)}"
        )
        console.print(line, soft_wrap=True)
        failed = failed or check.status == "fail"
    return 1 if failed else 0


def _checks(recipe: "Recipe | None", accelerate_config: Mapping[str, Any] | None) -> Iterator[Check]:
    from trb.models.packaged import quiet_libraries
    from trb.studies.packages import missing_packages

    quiet_libraries()
    yield from _check_software()
    yield from _check_machine()
    launch = Launch()
    if accelerate_config is not None:
        launch, check = _check_launch(accelerate_config)
        yield check
    if recipe is not None:
        args = recipe.training_config("unused")
        yield from (
            Check("fail", "packages", problem) for problem in missing_packages(args, recipe.run.teacher_quantization)
        )
        yield from _check_pair(recipe, args, launch, has_lengths=recipe.source != "options")


def _check_launch(config: Mapping[str, Any]) -> tuple[Launch, Check]:
    """What a configuration of `accelerate launch` asks for, and whether runs can be made that way."""
    kind, processes = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    fsdp, deepspeed = config.get("fsdp_config") or {}, config.get("deepspeed_config") or {}
    stage = f" ZeRO-{deepspeed['zero_stage']}" if "zero_stage" in deepspeed else ""
    text = f"{kind}{stage}, {processes} process{'es' if processes > 1 else ''}"
    remedy = ""
    if kind == "FSDP" and fsdp.get("fsdp_version") != 2:
        remedy = "Set fsdp_version: 2"
    elif kind == "FSDP" and fsdp.get("fsdp_cpu_ram_efficient_loading", True):
        remedy = "Set fsdp_cpu_ram_efficient_loading: false; the teacher of every process but one would be empty"
    strategy = "fsdp" if kind == "FSDP" else "zero3" if deepspeed.get("zero_stage") == 3 else "ddp"
    return Launch(processes, strategy), Check("fail" if remedy else "ok", "launch", text, remedy)


def _check_software() -> Iterator[Check]:
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("ok" if sys.version_info >= (3, 11) else "fail", "python", python, "")
    try:
        requirements = [Requirement(text) for text in requires("trb") or []]
    except PackageNotFoundError:
        requirements = [
            Requirement(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
        ]
        yield Check(
            "warn", "trb", f"{trb.__version__}, not installed: its version ranges are not checked", "pip install ."
        )
    else:
        yield Check("ok", "trb", trb.__version__)
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check("fail", requirement.name, "missing", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check("ok", requirement.name, found)
        else:
            yield Check(
                "fail", requirement.name, f"{found}, supported: {requirement.specifier}", f"pip install '{requirement}'"
            )


def _check_machine() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check("ok", f"gpu {index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    elif torch.accelerator.is_available():
        yield Check("ok", "accelerator", str(torch.accelerator.current_accelerator()))
    else:
        yield Check("warn", "gpu", "none", "The zoo and models to about 0.2 B parameters train on a CPU")
    yield Check("ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use by torch")
    yield Check("ok", "memory", f"{_memory_bytes() / 1e9:.1f} GB available")
    free = shutil.disk_usage(".").free
    status: Literal["ok", "warn"] = "ok" if free > 5e9 else "warn"
    remedy = "" if free > 5e9 else "A checkpoint takes about 3 times the student; choose --output-dir on a larger disk"
    yield Check(status, "disk", f"{free / 1e9:.1f} GB free here", remedy)


def _memory_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available


def _check_pair(recipe: "Recipe", args: "TRBConfig", launch: Launch, *, has_lengths: bool) -> Iterator[Check]:
    from trb.studies.material import load_tokenizers, longest_teacher_prompt
    from trb.studies.shared import trains_own_adapter
    from trb.training.doubts import of_rate
    from trb.training.routes import value_for

    run = recipe.run
    try:
        with recipe.places.told():
            tokenizer, teacher_tokenizer = load_tokenizers(run)
    except (ValueError, OSError, ImportError) as error:
        yield Check("fail", "tokenizer", message(error))
        return
    yield Check("ok", "tokenizer", f"the same for {'all' if run.teachers else 'both'}, {len(tokenizer)} tokens")
    for name in run.pairs():
        yield from _of(name, _check_template(run, args, tokenizer, value_for(name, teacher_tokenizer)))
    try:
        with recipe.places.told():
            pairs = outlined_pairs(run)
    except (ValueError, OSError, ImportError) as error:
        yield Check("fail", "models", message(error))
        return
    taught = longest_teacher_prompt(run, args)
    for name, pair in run.pairs().items():
        tokenizers = tokenizer, value_for(name, teacher_tokenizer)
        found = [*_of(name, _check_models(pair, args, launch, tokenizers, pairs[name], taught))]
        yield from found
        if found[-1].status == "fail":
            return
    if has_lengths:  # a bare pair has no recipe that says how long its sequences are
        student, _ = next(iter(pairs.values()))
        adapters = bool(run.lora_rank) or trains_own_adapter(run)
        yield from (Check("warn", *doubt) for doubt in of_rate(args, student, adapters=adapters))
        yield from _check_prompts(run, args)
        for name, both in pairs.items():
            yield from _of(name, iter([_check_lengths(run, args, *both, taught)]))
        yield _check_memory(run, args, launch, pairs, taught)


def _of(name: str | None, checks: Iterator[Check]) -> Iterator[Check]:
    """Of several teachers, checks say which one they are about."""
    yield from (check if name is None else check._replace(subject=f"{check.subject} ({name})") for check in checks)


def _check_models(
    run: "RunConfig",
    args: "TRBConfig",
    launch: Launch,
    tokenizers: "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]",
    pair: "tuple[PreTrainedModel, PreTrainedModel]",
    taught: int | None,
) -> Iterator[Check]:
    """Of one pair; what cannot be mended comes last."""
    from trb.models.sharing import is_shared
    from trb.studies.shared import doubts_of_base
    from trb.training.doubts import of_pair
    from trb.vocab import SharedVocabulary, check_heads, head_rows, stop_token_ids

    (tokenizer, teacher_tokenizer), (student, teacher) = tokenizers, pair
    try:
        used = max(tokenizer.get_vocab().values()) + 1
        rows = head_rows(student), head_rows(teacher)
        check_heads(*rows, used)
    except (ValueError, OSError, ImportError) as error:
        yield Check("fail", "models", message(error))
        return
    same = "" if rows[0] == rows[1] else f": blended and scored on the {min(rows)} both have"
    yield Check("ok", "heads", f"student {rows[0]} rows, teacher {rows[1]}, tokenizer uses {used}{same}")
    if is_shared(run.teacher):
        yield _check_shared(run, args, launch, student, teacher)
        yield from (Check("warn", *doubt) for doubt in doubts_of_base(run))
    try:
        stops = stop_token_ids(student, tokenizer), stop_token_ids(teacher, teacher_tokenizer)
        shared = SharedVocabulary.of_pair(student, teacher, tokenizer, teacher_tokenizer)
    except ValueError as error:
        yield Check("fail", "end of sequence", str(error), "Set eos_token_id in the model's generation_config.json")
        return
    folded = f"{', '.join(map(str, shared.folded_ids))} folded onto it" if shared.folded_ids else "nothing to fold"
    yield Check(
        "ok",
        "end of sequence",
        f"student stops with {_ids(stops[0])}, teacher with {_ids(stops[1])}; {shared.stop_id} is emitted, {folded}",
    )
    told = run.train_privileged_column or args.teacher_system_prompt or taught
    alike = not told and _same_files(run)
    yield from (Check("warn", *doubt) for doubt in of_pair(student, teacher, same=alike))


def _check_template(
    run: "RunConfig", args: "TRBConfig", tokenizer: "PreTrainedTokenizerBase", teacher: "PreTrainedTokenizerBase"
) -> Iterator[Check]:
    from trb.studies.material import chat_doubts

    if not tokenizer.chat_template:
        remedy = "Set chat_template to a Jinja file or plain" + (", or to teacher" if teacher.chat_template else "")
        yield Check("fail", "chat template", "the student's tokenizer has none", remedy)
        return
    found = [Check("warn", *doubt) for doubt in chat_doubts(run, args, tokenizer, teacher, None)]
    yield from found or [Check("ok", "chat template", run.chat_template or "present")]


def _check_shared(
    run: "RunConfig", args: "TRBConfig", launch: Launch, student: "PreTrainedModel", teacher: "PreTrainedModel"
) -> Check:
    """Of a teacher on the student's weights: how many of its weights are its own, and what cannot be had with it."""
    from trb.models.sharing import own_weights

    remedy = "Name the base model as the teacher, which takes its memory a second time"
    if launch.sharded:
        return Check("fail", "one set of weights", "FSDP and ZeRO-3 divide what the teacher stands on", remedy)
    if args.use_vllm:
        return Check("fail", "one set of weights", "use_vllm changes what the teacher stands on at each step", remedy)
    count = sum(weight.numel() for _, weight in own_weights(teacher, student))
    own = f"and {count / 1e6:.2f} million of its own" if count else "and none of its own"
    return Check("ok", "one set of weights", f"{run.teacher} has the student's, {own}")


def _same_files(run: "RunConfig") -> bool:
    """Whether student and teacher have the same weights on disk: files of the same sizes, beginnings and ends."""
    from trb.models.loading import resolve
    from trb.models.sharing import BASE, is_shared
    from trb.studies.shared import trains_own_adapter

    if is_shared(run.teacher):
        return run.teacher == BASE and not trains_own_adapter(run)  # an adapter begins as nothing
    if run.student_keep_layers is not None:
        return False
    files = []
    for spec, revision in ((run.student, run.student_revision), (run.teacher, run.teacher_revision)):
        folder = Path(resolve(spec, revision))
        files.append([_fingerprint(path) for path in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else [])
    return bool(files[0]) and files[0] == files[1]


def _fingerprint(path: Path) -> tuple[int, bytes, bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        return size, start, file.read()


def _check_prompts(run: "RunConfig", args: "TRBConfig") -> Iterator[Check]:
    """Training prompts, where reading them takes no download; and settings that depend on how many there are."""
    from trb.studies import material
    from trb.training.doubts import of_settings, steps_of

    steps = int(args.max_steps) if args.max_steps > 0 else None
    if material.is_local(run.train_data):
        try:
            tokenizer, _ = material.load_tokenizers(run)
            prompts, _ = material.training_prompts(run, args, tokenizer)
        except (ValueError, OSError, ImportError) as error:
            yield Check("fail", "prompts", message(error))
        else:
            steps = steps_of(args, len(prompts))
            found = [*material.data_doubts(run), *material.prompt_doubts(prompts, tokenizer, args)]
            found += material.route_doubts(run, args, prompts, {})
            yield from (Check("warn", *doubt) for doubt in found)
            if not found:
                yield Check("ok", "prompts", f"{len(prompts)} to train on, {steps} steps")
    yield from (Check("warn", *doubt) for doubt in of_settings(args, steps))


def _ids(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _check_lengths(
    run: "RunConfig", args: "TRBConfig", student: "PreTrainedModel", teacher: "PreTrainedModel", taught: int | None
) -> Check:
    from trb.training.doubts import longest_completion, of_lengths

    lengths = run.max_prompt_length, run.eval_max_new_tokens
    for doubt in of_lengths(args, student, teacher, *lengths, taught):
        return Check("fail", *doubt)
    longest = max(run.max_prompt_length, taught or 0) + longest_completion(args, run.eval_max_new_tokens)
    return Check("ok", "lengths", f"up to {longest} tokens fit both models")


def _check_memory(
    run: "RunConfig",
    args: "TRBConfig",
    launch: Launch,
    pairs: "Mapping[str | None, tuple[PreTrainedModel, PreTrainedModel]]",
    taught: int | None,
) -> Check:
    available = device_bytes(args.device.type)
    try:
        phase, parts = largest_phase(run, args, launch, pairs, available, taught)
    except ValueError as error:
        return Check("warn", "memory estimate", str(error))
    needed = sum(parts.values())
    text = (
        f"about {needed / 1e9:.1f} GB on {'each' if launch.processes > 1 else 'one'} device in the {phase} phase (a "
        f"rough estimate: {', '.join(f'{name} {size / 1e9:.1f}' for name, size in parts.items() if size)}); "
        f"{available / 1e9:.1f} GB are free"
    )
    remedy = "Lower per_device_train_batch_size or rollout_batch_size, use bfloat16 or lora_rank"
    remedy += ", or set teacher_sharded" if launch.sharded else ", or shard with FSDP2"
    if needed > available:
        return Check("fail", "memory estimate", text, remedy)
    return (
        Check("warn", "memory estimate", text, remedy)
        if not fits(needed, available)
        else Check("ok", "memory estimate", text)
    )


def largest_phase(
    run: "RunConfig",
    args: "TRBConfig",
    launch: Launch,
    pairs: "Mapping[str | None, tuple[PreTrainedModel, PreTrainedModel]]",
    available: float,
    taught: int | None,
) -> tuple[str, dict[str, float]]:
    """The phase of a step that takes most of this machine, with its bytes by component; `taught` as in `step_of`."""
    from dataclasses import replace

    from trb.cli.plan import pair_of_all, step_of
    from trb.planning import MACHINES, Figure, Layout, make_plan
    from trb.training.methods import behavior_of, needs_teacher

    # Of the rates, only the choice of a block depends on them.
    like = MACHINES["h100" if args.device.type == "cuda" else "cpu"]
    here = replace(like, memory=Figure(available, "measured", "free now"), reserved=Figure(0, "measured", "not free"))
    # A teacher that samples first is whole until it has left the sampler.
    divided = args.teacher_sharded and not needs_teacher(behavior_of(args), 0)
    layout = Layout(launch.processes, launch.strategy, teacher_sharded=divided)
    pair, work = pair_of_all(run, args, pairs), step_of(run, args, launch.processes, taught)
    memory = make_plan(pair, work, layout, here).memory
    return max(memory.items(), key=lambda phase: sum(phase[1].values()))


def fits(needed: float, available: float) -> bool:
    """Whether an estimate of memory leaves room for what it is off by."""
    return needed <= 0.8 * available


def device_bytes(device: str) -> int:
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else _memory_bytes()
