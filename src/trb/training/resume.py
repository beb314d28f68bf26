"""What a run is, kept in each of its checkpoints, and compared before one is resumed from.

`trb_run.json` holds every option that changes results, fingerprints of the training prompts and of the tokenizer, the
stop ids, the number of processes, and the identity of both models. `differences` says what a later run has otherwise.

What may change freely is listed here, with the reason; every other option of the configuration is compared, also one
that a later version of TRL or transformers adds. Three things are compared by what they do: the length of training only
where the schedule depends on it, the layout of a step (rows at once, accumulation, processes) only if another number of
completions comes out, and the student's weights only where training leaves them alone (a checkpoint brings the rest).

Left out on purpose: the fingerprint that `datasets` keeps, which differs for equal data (it depends on the cache's
files and is drawn at random for some maps); evaluation data, which decides nothing about training; and versions of
libraries (`trb.studies.provenance`).
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trb.errors import InputError
from trb.models.modeling import without_adapters
from trb.records import RUN, progress_name
from trb.safety.files import json_types, stable_json
from trb.training.methods import behavior_of, every_knob, knobs_of, target_of
from trb.training.privileged import CONTEXT, WHOLE
from trb.training.routes import Routes
from trb.vocab import SharedVocabulary

__all__ = [
    "FREE",
    "LAYOUT",
    "LENGTH",
    "ChangedRunError",
    "Difference",
    "describe",
    "differences",
    "explain",
    "explain_missing",
    "length_matters",
    "missing_state",
    "plain",
    "read",
    "write",
]

# Options that change nothing beyond rounding, by the reason.
_FREE_BECAUSE = {
    "says what is written, and where": """
        output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node log_level
        log_level_replica log_completions num_completions_to_print log_unique_prompts disable_tqdm report_to run_name
        project trackio_space_id trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen
        recorded_rollouts recorded_alternatives recorded_scores_every skip_memory_metrics debug""",
    "says what is saved, and where": """
        save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
        checkpoint_checksums push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
        hub_revision""",
    "says which step to begin with, or to give up at": """
        resume_from_checkpoint restore_callback_states_from_checkpoint max_skipped_steps tool_timeout""",
    "names a model, whose weights are compared": "teacher_model_name_or_path",
    "lays out the same evaluation (its draws are functions of prompt and seed)": """
        eval_on_start per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
        prediction_loss_only include_for_metrics batch_eval_metrics label_names""",
    "lays out the same rollouts (a completion does not depend on its batch, its blocks or the sampler)": """
        sampler block_size rollout_batch_size""",
    "lays out the same sums, so that only rounding differs": """
        loss_chunk_tokens gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
        activation_checkpointing_kwargs use_cache torch_empty_cache_steps pad_to_multiple_of full_determinism use_cpu
        teacher_sharded teacher_offload ds3_gather_for_generation""",
    "says how processes and workers talk": """
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context ddp_find_unused_parameters ddp_bucket_cap_mb ddp_static_graph ddp_backend
        ddp_timeout local_rank vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_server_base_url vllm_server_host
        vllm_server_port vllm_server_timeout vllm_request_timeout vllm_group_port""",
    "is read by nothing here": """
        do_train do_eval do_predict train_sampling_strategy length_column_name""",
}
FREE = {name: reason for reason, names in _FREE_BECAUSE.items() for name in names.split()}

# Compared where the learning rate, or another schedule, depends on how long training is.
LENGTH = ("max_steps", "num_train_epochs")

# Compared if the number of completions in an optimizer step differs.
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")

# Schedules of transformers that are functions of the step alone, and those that read warmup_steps, which is a
# share of the length below 1.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
_WARMED_UP = ("constant_with_warmup", "inverse_sqrt")
# A resumed optimizer takes these from the checkpoint, whatever the configuration says.
_KEPT_BY_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

SAMPLED_ROWS = 1 << 16
_SAMPLED_WEIGHTS = 64  # of each tensor
_COLUMNS = {"prompts": "prompt", "answers": "answer"}
_TEACHERS_COLUMNS = {"teacher_prompts": WHOLE, "privileged_contexts": CONTEXT}
# What a configuration holds beside the model: where it came from, and ids that the tokenizer decides.
_NOT_THE_MODEL = (
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype"),  # its dtype may be the file's
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_NOT_THE_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


class ChangedRunError(InputError):
    """A checkpoint of a run with other settings, data or models; the message lists what differs."""


@dataclass(frozen=True)
class Difference:
    """One thing that a checkpoint has otherwise than the run that would go on from it."""

    key: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.saved)} -> {_shown(self.now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- describing a run ----


def describe(
    args: Any,
    *,
    world_size: int,
    train_dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: SharedVocabulary,
    student: nn.Module,
    teachers: Mapping[str | None, nn.Module],
    routes: Routes | None = None,
    tools: Sequence[str] = (),
) -> dict[str, Any]:
    """What a run is, as JSON types: one level of keys, dotted where they are no option.

    Args:
        args: a `TRBConfig`.
        world_size: processes of the launch.
        train_dataset: map-style, with a "prompt" column and maybe answers and prompts for the teacher. All rows are
            hashed, in their order; of a set of more than 65,536, as many evenly spaced ones, the first and the last
            included, so that a change of single rows between them is missed.
        tokenizer: the student's, with its chat template.
        vocabulary: the events that both models share.
        student: the model in training, PEFT wrapper included.
        teachers: the teachers by name, whole; None for the name of the only one. Of each tensor at most 64 evenly
            spaced numbers are hashed.
        routes: whose each row is, of several teachers.
        tools: what the functions that the model may call are called; what they do is not known.
    """
    unread = every_knob() - knobs_of([args])
    own = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.name not in FREE}
    return {
        **{name: plain(value) for name, value in own.items() if name not in unread},
        **({"tools": list(tools)} if tools else {}),
        "world_size": world_size,
        **{f"train_dataset.{key}": value for key, value in _dataset(train_dataset, routes).items()},
        "tokenizer.vocabulary": _digest([json.dumps(sorted(tokenizer.get_vocab().items()))]),
        "tokenizer.chat_template": _digest([json.dumps(tokenizer.chat_template)]),
        "stop_ids": list(vocabulary.stop_ids),
        **{f"student.{key}": value for key, value in _model(student, frozen_only=True).items()},
        "teachers": [] if routes is None else sorted(routes.names),
        **{
            f"{_teachers_key(name)}.{key}": value
            for name, teacher in teachers.items()
            for key, value in _model(teacher, frozen_only=False).items()
        },
    }


def _teachers_key(name: str | None) -> str:
    return "teacher" if name is None else f"teachers.{name}"


def _dataset(dataset: Any, routes: Routes | None) -> dict[str, Any]:
    if dataset is None:
        return {}
    rows = len(dataset)
    indices = spread(rows, SAMPLED_ROWS)
    sampled = {key: _digest(map(stable_json, _column(dataset, name, indices))) for key, name in _COLUMNS.items()}
    for key, name in _TEACHERS_COLUMNS.items():
        values = list(_column(dataset, name, indices))
        sampled[key] = _digest(map(stable_json, values if any(value is not None for value in values) else ()))
    if routes is not None:
        sampled["teachers"] = _digest(map(stable_json, _column(dataset, routes.column, indices)))
    return {"rows": rows, **sampled}


def _column(dataset: Any, name: str, indices: Sequence[int]) -> Iterator[Any]:
    """A column's values in some rows, of a `datasets.Dataset` or of anything else that is indexed; None without it."""
    if not hasattr(dataset, "select_columns"):
        yield from (dataset[index].get(name) for index in indices)
    elif name in dataset.column_names:
        yield from dataset.with_format(None).select_columns([name]).select(indices)[:][name]


def _model(model: nn.Module, *, frozen_only: bool) -> dict[str, Any]:
    inner = without_adapters(model)
    weights = (weight for weight in model.parameters() if not (frozen_only and weight.requires_grad))
    adapters = getattr(model, "peft_config", {}) if inner is not model else {}
    return {
        "class": type(inner).__name__,
        "dtype": str(inner.dtype).removeprefix("torch."),
        **{f"config.{key}": plain(value) for key, value in _kept(inner.config.to_dict(), _NOT_THE_MODEL)},
        "adapters": {name: dict(_kept(plain(config), _NOT_THE_ADAPTER)) for name, config in adapters.items()},
        "frozen_weights" if frozen_only else "weights": _digest(map(_numbers, weights)),
    }


def _kept(values: Mapping[str, Any], without: Sequence[str]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in sorted(values.items()) if key not in without)


def _numbers(weight: Tensor) -> bytes:
    """The shape of a tensor, and a few of its numbers as they lie in memory."""
    shape = str(tuple(weight.shape)).encode()
    if weight.is_meta or not weight.numel() or type(weight.data) is not Tensor:
        return shape  # without numbers, in shards, or packed in a way that only its class can index
    index = torch.tensor(spread(weight.numel(), _SAMPLED_WEIGHTS), device=weight.device)
    # By coordinates: flattening would copy what is not contiguous.
    chosen = weight.detach()[torch.unravel_index(index, weight.shape)] if weight.dim() else weight.detach()[None]
    return shape + chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `total` indices, evenly spaced, the first and the last included."""
    if total <= count:
        return list(range(total))
    return [place * (total - 1) // (count - 1) for place in range(count)]


def _digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of parts, each set apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON types that are equal in every process for equal values."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # and no class of its own, which YAML would not write
    if value is None or isinstance(value, bool | str | float):
        return value
    # The text of other objects may hold their address.
    return str(value) if isinstance(value, torch.dtype | torch.device | Path) else type(value).__qualname__


# ---- the file ----


def write(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Put a run's description into a checkpoint that is being written."""
    RUN.write(checkpoint / RUN, json_types(run))


def read(checkpoint: Path) -> dict[str, Any] | None:
    """What `write` has left, or None where an older version has saved. Raises ValueError if it is damaged."""
    path = checkpoint / RUN
    return RUN.read(path) if path.exists() else None


def missing_state(checkpoint: Path, *, deepspeed: bool) -> list[str]:
    """What a checkpoint lacks of a run beside its weights: what transformers does not find begins anew without a word.

    DeepSpeed keeps optimizer and scheduler in a folder of its own, and FSDP the optimizer under another name.
    """
    files = {path.name: path.is_dir() for path in checkpoint.iterdir()}
    if deepspeed:
        optimizer = scheduler = any(name.startswith("global_step") for name in files)
    else:
        known = ("optimizer.pt", "optimizer.bin")
        optimizer = any(name in known or (folder and "optimizer" in name) for name, folder in files.items())
        scheduler = "scheduler.pt" in files
    held = {"optimizer": optimizer, "scheduler": scheduler, "sums since the last log": progress_name(0) in files}
    return [name for name, found in held.items() if not found]


# ---- comparing ----


def length_matters(args: Any) -> bool:
    """Whether a step's results depend on how many steps are to come."""
    schedule = plain(args.lr_scheduler_type)
    warmup_is_share = schedule in _WARMED_UP and 0 < args.warmup_steps < 1
    behavior, target = behavior_of(args), target_of(args)
    schedules = (*behavior.schedules(), *target.schedules())
    return schedule not in _ENDLESS or warmup_is_share or any(each.follows_length for each in schedules)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], *, length: bool) -> list[Difference]:
    """What differs between a checkpoint's run and the present one, in the order of the keys.

    Options that only one of the two knows are passed over: another version has added or removed them.

    Args:
        saved: of the checkpoint (`read`).
        now: of the run that would go on from it (`describe`).
        length: whether its schedule depends on the length of training (`length_matters`).
    """
    now = json_types(now)
    ignored = {*FREE, *(() if length else LENGTH)}
    if length and now["max_steps"] > 0:
        ignored.add("num_train_epochs")  # max_steps wins
    if _completions(saved) == _completions(now):
        ignored.update(LAYOUT)
    shared = [key for key in now if key in saved and key not in ignored]
    return [Difference(key, saved[key], now[key]) for key in shared if saved[key] != now[key]]


def _completions(run: Mapping[str, Any]) -> int:
    """Completions in an optimizer step."""
    rows, accumulation, processes = (int(run.get(name, 0)) for name in LAYOUT)
    return rows * accumulation * processes


def explain(checkpoint: Path, found: Sequence[Difference], *, accepted: bool) -> str:
    """The refusal of a checkpoint, or the warning where its differences are accepted."""
    listed = "; ".join(map(str, found))
    if not accepted:
        return (
            f"{checkpoint} was written by a run that differs in what changes results (saved -> now): {listed}. Put it "
            "back as it was, start over in another output_dir, or go on all the same with accept_changes=True "
            "(trb train --accept-changes)"
        )
    kept = [difference.key for difference in found if difference.key in _KEPT_BY_OPTIMIZER]
    without_effect = f". The optimizer's saved state keeps its own {', '.join(kept)}" if kept else ""
    return f"going on from {checkpoint} with changes (saved -> now): {listed}{without_effect}"


def explain_missing(checkpoint: Path, missing: Sequence[str], *, accepted: bool) -> str:
    """The same of a checkpoint that does not hold the whole state of a run."""
    text = f"{checkpoint} holds no {', no '.join(missing)} (save_only_model keeps none), so that they begin anew"
    if accepted:
        return f"{text} after step {checkpoint.name.rpartition('-')[2]}"
    return (
        f"{text}. Resume from a whole checkpoint, start over in another output_dir, or go on all the same with "
        "accept_changes=True (trb train --accept-changes)"
    )
