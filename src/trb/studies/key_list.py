"""Every key of a recipe for people: in groups, the ten that matter first.

Left out: what the values may be (`trb.studies.keys`) and how the list is printed (`trb.cli.display`).
"""

import dataclasses
import re
from typing import Any, NamedTuple

from trb.studies.keys import default_of, run_fields, training_fields, type_in_words, valid_keys
from trb.training.config import TRBConfig
from trb.training.resume import plain

__all__ = ["FIRST", "Key", "describe_keys"]

FIRST = (
    *("student", "teacher", "train_data", "eval_data"),
    *("method", "initial_kl_budget", "blend_warmup_steps"),
    *("max_steps", "learning_rate", "max_completion_length"),
)

# A key belongs to the first group that fits; what is left is training.
_GROUPS = {
    "Models": r"student_.*|teachers|teacher_(revision|dtype|quantization|trust_remote_code|sharded|offload)|lora_.*"
    r"|chat_template"
    r"|replica_dtype",
    "Data": r"train_.*|system_prompt|max_prompt_length|overlong_prompts|chat_template_kwargs|shuffle_dataset"
    r"|teacher_(system_prompt|prompt_template|column)|dataloader_.*",
    "Evaluation": r"eval_.*|held_out_.*|reward_timeout_s|recorded_.*|per_device_eval_batch_size|.*_full_eval"
    r"|batch_eval_metrics|include_for_metrics|prediction_loss_only",
    "Training": r"learning_rate|weight_decay|disable_dropout|max_skipped_steps|checkpoint_checksums",
}


class Key(NamedTuple):
    """A key, what its value is, its default, and what it is for."""

    name: str
    kind: str
    default: str
    text: str


def describe_keys() -> dict[str, list[Key]]:
    """Every key once, by group; in each group ours come before those of TRL and transformers."""
    own = {name for name in TRBConfig.__annotations__ if name in training_fields()}
    groups: dict[str, list[Key]] = {"The ten that matter first": [_described(key) for key in FIRST]}
    groups |= {title: [] for title in ("Models", "Data", "Method", "Training", "Evaluation")}
    for key in sorted(valid_keys(), key=lambda key: (key not in run_fields(), key not in own)):
        if key not in FIRST:
            groups[_group(key, own)].append(_described(key))
    return groups


def _group(key: str, own: set[str]) -> str:
    for title, pattern in _GROUPS.items():
        if re.fullmatch(pattern, key):
            return title
    return "Method" if key in own or key in ("methods", "temperature") else "Training"


def _described(key: str) -> Key:
    item = run_fields().get(key) or training_fields()[key]
    default = default_of(item)
    shown = "required" if default is dataclasses.MISSING else f"default {_shown(default)}"
    # The libraries write their texts for argparse, which reads two percent signs as one.
    text = " ".join(str(item.metadata.get("help", "")).replace("%%", "%").split())
    return Key(key, type_in_words(key), shown, text)


def _shown(value: Any) -> str:
    value = plain(value)
    text = str(value).replace("\n", "\\n")  # the list has a line for each key
    return "null" if value is None else text.lower() if isinstance(value, bool) else text or "empty"
