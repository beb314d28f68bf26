"""`TRBConfig`: every option of a training run, on top of TRL's, and the values of TRL's that are refused.

Defaults live here and nowhere else. Which behavior or loss reads a knob is said in `trb.training.methods`; which option
may change when a run is resumed, in `trb.training.resume`.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging
from trl import DistillationConfig

from trb.errors import InputError, did_you_mean
from trb.losses.terms import TOP_K
from trb.records import ROLLOUTS
from trb.safety.untrusted import check_text
from trb.sampling import SAMPLERS
from trb.sampling.vllm.served import REQUEST_SECONDS
from trb.tools import TOOLS
from trb.training import privileged
from trb.training.behaviors import BLEND_WARMUP_STEPS, DEFAULT_BUDGET, FALLING, HELD, budget_schedule_of
from trb.training.methods import BEHAVIORS, BUDGET_SCHEDULES, METHODS, TARGETS, check_choice, check_choices, halves
from trb.training.numbers import check_numbers
from trb.training.words import check_words

__all__ = ["REPLICA_DTYPES", "TRBConfig", "largest_divisor"]

logger = logging.get_logger(__name__)

_COMPILES = "models are read inside the wrapper that compiles, which would do nothing"

# Options of TRL and transformers that would change the sampled law, the prompts of a step or the loss, or that would do
# nothing here, with the only value this trainer supports. A test classifies every option of the installed versions.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "beta": (1.0, "the loss is the reverse KL"),
    "top_p": (1.0, "completions are drawn from the exact law; truncating it is not supported"),
    "top_k": (0, "completions are drawn from the exact law; for the loss's support set loss_top_k"),
    "min_p": (None, "completions are drawn from the exact law; truncating it is not supported"),
    "repetition_penalty": (1.0, "completions are drawn from the exact law"),
    "generation_kwargs": (None, "trb's samplers take no generation options"),
    "cache_implementation": (None, "trb's samplers manage their own caches"),
    "vllm_structured_outputs_regex": (None, "completions are drawn from the exact law; a grammar would truncate it"),
    "label_smoothing_factor": (0.0, "the loss is the reverse KL, which has no labels"),
    "label_names": (None, "the loss is the reverse KL, which has no labels"),
    "neftune_noise_alpha": (None, "the loss is taken at the policy that was sampled from, without noise"),
    "average_tokens_across_devices": (True, "the loss is the mean over the completion tokens of all processes"),
    "auto_find_batch_size": (False, "a step has as many rollouts as its batch; set per_device_train_batch_size"),
    "train_sampling_strategy": ("random", "each prompt is repeated for its rollouts; set shuffle_dataset"),
    "length_column_name": ("length", "prompts are not grouped by length"),
    "data_seed": (None, "the order of prompts follows seed"),
    "dataloader_in_order": (True, "rollouts are reused over accumulation steps, which takes batches in their order"),
    "torch_compile": (False, _COMPILES),
    "torch_compile_backend": (None, _COMPILES),
    "torch_compile_mode": (None, _COMPILES),
    "enable_jit_checkpoint": (
        False,
        "it saves amid a step, whose numbers a resumed run would count twice; see save_steps",
    ),
    "ds3_gather_for_generation": (True, "under ZeRO-3 a whole copy is sampled from; see replica_dtype"),
    "include_for_metrics": ([], "an evaluation keeps no predictions; pass reward_fn to measure completions"),
    "batch_eval_metrics": (False, "an evaluation keeps no predictions; pass reward_fn to measure completions"),
    "eval_accumulation_steps": (None, "an evaluation keeps no predictions"),
    "eval_do_concat_batches": (True, "an evaluation keeps no predictions"),
    "eval_use_gather_object": (False, "an evaluation keeps no predictions"),
}
# The same of `accelerator_config`.
_UNSUPPORTED_IN_ACCELERATE: dict[str, tuple[tuple, str]] = {
    "split_batches": ((False,), "every process has per_device_train_batch_size rollouts"),
    "dispatch_batches": ((None, False), "every process reads its own prompts"),
    "use_seedable_sampler": ((True,), "the order of prompts follows seed"),
}

# The dtype of what is sampled from under sharding; None is decided by the precision of training.
REPLICA_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Preferred(int):
    """A number that nobody chose, and that may give way."""


_ROLLOUTS = _Preferred(4)


@dataclass
class TRBConfig(DistillationConfig):
    """Every knob of `TRBTrainer`, on top of TRL's `DistillationConfig`.

    Defaults are the paper's (section 6), but for the budget: where neither the paper's ε0 nor its K is given, the
    warm-up sets itself (`budget_schedule`).
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Dropout, skipped layers and jitter off in training: what learns is the student that was sampled."
        },
    )
    method: str = field(
        default="trb",
        metadata={"help": "; ".join(f"{name}: {method.text}" for name, method in METHODS.items())},
    )
    behavior: str | None = field(
        default=None,
        metadata={
            "help": "What rollouts are drawn from, in place of the method's own: "
            + "; ".join(f"{name}: {half.text}" for name, half in BEHAVIORS.items())
        },
    )
    loss: str | None = field(
        default=None,
        metadata={
            "help": "What the loss matches, in place of the method's own: "
            + "; ".join(f"{name}: {half.text}" for name, half in TARGETS.items())
        },
    )
    num_generations: int = field(
        default=_ROLLOUTS,
        metadata={
            "help": "Rollouts per prompt in an optimizer step. Left out, the largest number up to "
            f"{_ROLLOUTS} that divides its completions."
        },
    )
    initial_kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "ε0 of trb, fixed and share: KL(behavior || student) per token, in nats. None is "
            f"{DEFAULT_BUDGET:g} where one is read; with budget_schedule=gap, what spends sequence_kl_budget."
        },
    )
    sequence_kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "B of budget_schedule=sequence, sequence-linear and gap, and of geometric: KL(behavior || student) "
            f"of a whole completion, in nats, on average. None is {HELD:g}; with budget_schedule=sequence-linear, "
            f"{FALLING:g}."
        },
    )
    blend_warmup_steps: int | None = field(
        default=None,
        metadata={
            "help": "K of trb and share: optimizer steps until the budget, or the share, is 0 and the teacher stops "
            f"sampling. None is {BLEND_WARMUP_STEPS}."
        },
    )
    budget_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How trb's budget falls. None is linear where initial_kl_budget or blend_warmup_steps is given, "
            "and otherwise sequence-linear, which needs neither. "
            + "; ".join(f"{name}: {kind.text}" for name, kind in BUDGET_SCHEDULES.items())
        },
    )
    behavior_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of each prompt's rollouts that are drawn from the behavior; the others are the student's "
            f"own. None is 1; with budget_schedule=gap, which compares the two, {BUDGET_SCHEDULES['gap'].share:g}."
        },
    )
    teacher_weight: float | None = field(
        default=None,
        metadata={"help": "geometric: the teacher's weight at every prefix; None is what spends sequence_kl_budget."},
    )
    skd_teacher_top_k: int = field(default=25, metadata={"help": "skd: student tokens inside it are kept."})
    skd_teacher_temperature: float = field(
        default=0.6, metadata={"help": "skd: temperature of the teacher sample that replaces a token."}
    )
    initial_temperature: float = field(
        default=0.9,
        metadata={"help": "temperature: rollout temperature at step 0, relative to `temperature`."},
    )
    temperature_warmup_steps: int = field(
        default=25, metadata={"help": "temperature: optimizer steps until the rollout temperature is 1."}
    )
    initial_horizon: int = field(
        default=32, metadata={"help": "horizon: tokens after which completions of step 0 are cut."}
    )
    horizon_steps: int = field(
        default=25, metadata={"help": "horizon: optimizer steps until completions have max_completion_length tokens."}
    )
    initial_prefix_share: float = field(
        default=0.5,
        metadata={"help": "prefix: share of a teacher's completion that the student goes on from at first."},
    )
    prefix_steps: int = field(
        default=25,
        metadata={"help": "prefix: optimizer steps until completions are all the student's."},
    )
    sft_warmup_steps: int = field(
        default=25, metadata={"help": "sft: supervised updates on teacher completions before distillation."}
    )
    veto_strength: float = field(default=0.4, metadata={"help": "veto: b at step 0."})
    veto_steps: int | None = field(
        default=None, metadata={"help": "veto: optimizer steps until b is 0; None for the whole training."}
    )
    eopd_entropy: float = field(
        default=0.8, metadata={"help": "eopd: nats of the teacher's entropy above which the forward KL is added."}
    )
    forward_top_k: int = field(
        default=TOP_K,
        metadata={
            "help": "eopd and tropd: support of the forward KL, the teacher's k likeliest tokens; 0 for the vocabulary."
        },
    )
    tip_share: float = field(
        default=0.5, metadata={"help": "tip: share of each completion's tokens that is learnt from."}
    )
    iw_gamma: float = field(
        default=0.5, metadata={"help": "iw: the first token of a completion weighs 1 + gamma, the last one about 1."}
    )
    loss_top_k: int = field(
        default=TOP_K,
        metadata={"help": "Support of the loss: the student's k likeliest tokens; 0 for the vocabulary."},
    )
    loss_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens projected to the vocabulary at once in the loss: bounds its memory. None leaves the number "
            "to the device."
        },
    )
    teacher_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message that the teacher reads in place of the prompt's own; it needs messages."},
    )
    teacher_prompt_template: str = field(
        default="{prompt}\n\n{privileged_context}",
        metadata={
            "help": "Of data with a column privileged_context: the text that the teacher reads in place of the "
            "student's prompt, or of its last message."
        },
    )
    teacher_column: str | None = field(
        default=None,
        metadata={
            "help": "Of several teachers: the column of the data with the name of each row's teacher. None is "
            "teacher_id, TRL's."
        },
    )
    teacher_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the teachers' weights in main memory, and copy each to the accelerator while it samples and "
            "scores its rows, one at a time."
        },
    )
    sampler: str = field(default="speculative", metadata={"help": f"How rollouts are computed: {', '.join(SAMPLERS)}."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "speculative: tokens drafted before the teacher reads them. None chooses from acceptance and the "
            "models' shapes, in the same way in every run."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows sampled at once per process, to bound KV-cache memory; None for all."},
    )
    replica_dtype: str = field(
        default="auto",
        metadata={
            "help": "Under FSDP2 and ZeRO-3: dtype of the whole copies that are sampled from. auto is the precision of "
            "training: bfloat16 with bf16, else the weights' own."
        },
    )
    teacher_sharded: bool = field(
        default=False,
        metadata={
            "help": "Under FSDP2 and ZeRO-3: shard the teacher, but for its head, once it has left the sampler. Until "
            "then each process holds it whole."
        },
    )
    vllm_blended: bool = field(
        default=True,
        metadata={
            "help": "With use_vllm in colocate mode: rollouts that need the teacher come from vLLM as well, from an "
            "engine with copies of both models that is released when the warm-up ends. false blends without vLLM."
        },
    )
    vllm_request_timeout: float = field(
        default=REQUEST_SECONDS,
        metadata={
            "help": "With vllm_mode=server: seconds that one request to the server may take, to the last byte of its "
            "answer; then the run ends with an error."
        },
    )
    recorded_rollouts: int = field(
        default=4,
        metadata={"help": f"Rollouts written to {ROLLOUTS} each logged step, with per-token numbers."},
    )
    recorded_alternatives: int = field(
        default=3,
        metadata={
            "help": "Likeliest tokens under the student, the teacher and the behavior policy recorded with each token "
            "of those rollouts; 0 for none."
        },
    )
    recorded_scores_every: int = field(
        default=10,
        metadata={
            "help": "Every how many logged steps the recorded rollouts also get both models' log-probabilities and the "
            "likeliest tokens, which takes a pass of each model over them; 0 for never."
        },
    )

    tools: list[str] | str | None = field(  # in this order, as transformers' parser takes the last for a class
        default=None,
        metadata={
            "help": f"Tools that the model may call between its turns: {', '.join(TOOLS)}. In Python, TRBTrainer takes "
            "functions."
        },
    )
    tool_timeout: float = field(
        default=30.0,
        metadata={"help": "Seconds that one call of a tool may take; the model then reads that there was no answer."},
    )
    tool_max_characters: int = field(
        default=4096,
        metadata={"help": "Characters of a tool's answer that are kept; the rest is cut off."},
    )

    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "The run stops when so many steps in a row had a loss or gradient that is not finite. Such steps "
            "are skipped, and saved in skipped/."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "A resumed run takes the state of its callbacks from the checkpoint, such as what is left of an "
            "early stop's patience, and how they were built. false begins them anew, as they are now."
        },
    )
    checkpoint_checksums: bool = field(
        default=True,
        metadata={"help": "Checksums of checkpoints' contents, about 2 GB/s; false records and compares sizes only."},
    )

    def __post_init__(self) -> None:
        check_words(self)
        if not torch.accelerator.is_available():
            # On a machine with only a CPU the defaults of TRL (bf16, pinned memory) fail or warn at every run.
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
            self.dataloader_pin_memory = False
        self.report_to = self.report_to or "none"  # null in YAML, for which transformers would look for a reporter
        if getattr(self, "activation_checkpointing", False) is None:
            # transformers 5.23 renamed the option and warns at TRL's own default, which has the old name.
            self.activation_checkpointing = self.gradient_checkpointing
        if getattr(self, "activation_checkpointing_kwargs", False) is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        check_numbers(self)
        self._refuse_unsupported()  # before transformers turns one on for another
        super().__post_init__()
        self._rename_dtype()
        check_choices(self)
        self.budget_schedule = budget_schedule_of(self)
        if self.blend_warmup_steps is None:
            self.blend_warmup_steps = BLEND_WARMUP_STEPS
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("replica_dtype", self.replica_dtype, REPLICA_DTYPES)
        self._refuse_unsupported_in_accelerate()
        for name in self.report_to:
            check_choice("report_to", name, INTEGRATION_TO_CALLBACK)
        self._check_scheduler()
        if "chat_template" in (self.chat_template_kwargs or {}):
            raise InputError(
                "chat_template_kwargs sets chat_template; set the tokenizer's chat_template instead (in recipes, "
                "chat_template with the name of a file)"
            )
        if self.max_completion_length is None:
            raise InputError("max_completion_length=None is not supported; set the longest completion in tokens")
        for half in halves():
            if all(hasattr(self, knob) for knob in half.knobs):  # those from outside may want another configuration
                half.build(self, lambda: 0).at(0)
        self._check_teachers()
        self._check_tools()
        if isinstance(self.num_generations, _Preferred):
            self.num_generations = self._fitting_generations(int(self.num_generations))

    def _rename_dtype(self) -> None:
        """What scripts for transformers 4 call it: TRL would load in float32 beside it, without a word."""
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            options: Any = getattr(self, name)
            if not options or "torch_dtype" not in options:
                continue
            options = dict(options)
            dtype = options.pop("torch_dtype")
            if options.setdefault("dtype", dtype) != dtype:
                raise InputError(
                    f"{name} has dtype={options['dtype']!r} and torch_dtype={dtype!r}: give one of the two"
                )
            setattr(self, name, options)

    def _refuse_unsupported(self) -> None:
        for name, (supported, why) in _UNSUPPORTED.items():
            if getattr(self, name) != supported:
                raise InputError(f"{name}={getattr(self, name)!r} is not supported ({why}); leave it at {supported!r}")

    def _refuse_unsupported_in_accelerate(self) -> None:
        for name, (allowed, why) in _UNSUPPORTED_IN_ACCELERATE.items():
            value = getattr(self.accelerator_config, name)
            if value not in allowed:
                raise InputError(
                    f"accelerator_config with {name}={value!r} is not supported ({why}); leave it at {allowed[0]!r}"
                )

    def _check_teachers(self) -> None:
        if self.teacher_offload and self.teacher_sharded:
            raise InputError(
                "teacher_offload=True and teacher_sharded=True are two places for the teacher: set one of them"
            )
        if self.teacher_column == "":
            raise InputError("teacher_column is empty; name a column of the data")
        if self.teacher_system_prompt == "":
            raise InputError("teacher_system_prompt is empty; leave it out for none")
        for name in ("teacher_system_prompt", "teacher_prompt_template"):
            check_text(getattr(self, name) or "", name)
        check_text(json.dumps(self.chat_template_kwargs, ensure_ascii=False, default=str), "chat_template_kwargs")
        if missing := [place for place in privileged.PLACES if place not in self.teacher_prompt_template]:
            raise InputError(f"teacher_prompt_template={self.teacher_prompt_template!r} has no {missing[0]}; put it in")

    def _check_tools(self) -> None:
        self.tools = [self.tools] if isinstance(self.tools, str) else self.tools
        for name in self.tools or ():
            if name not in TOOLS:
                raise InputError(
                    f"tools has {name!r}, which is none of {', '.join(TOOLS)}{did_you_mean(name, TOOLS)}; functions of "
                    "your own are passed in Python, TRBTrainer(tools=[...])"
                )

    def _check_scheduler(self) -> None:
        """Make the schedule once: transformers would when everything is loaded."""
        name: str = SchedulerType(self.lr_scheduler_type).value
        options: Any = self.lr_scheduler_kwargs or {}
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        try:
            get_scheduler(name, optimizer, 0, 1, scheduler_specific_kwargs=options)
        except (TypeError, ValueError) as error:
            raise InputError(f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={options}: {error}") from error

    @property
    def completions_per_step(self) -> int:
        """Of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def autocast_dtype(self) -> str | None:
        """What a step computes in; None where that is the weights' own dtype."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else None

    @property
    def blends_in_vllm(self) -> bool:
        """Whether rollouts that need the teacher come from vLLM, should there be any."""
        return self.use_vllm and self.vllm_mode == "colocate" and self.vllm_blended

    def _fitting_generations(self, preferred: int) -> int:
        batch = self.completions_per_step
        fitting = largest_divisor(batch, preferred)
        if fitting != preferred and self.process_index == 0:
            logger.warning(
                f"num_generations={fitting}: the default of {preferred} does not divide the {batch} completions of one "
                "optimizer step (per_device_train_batch_size x processes x gradient_accumulation_steps)"
            )
        return fitting


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`, and 1 at least."""
    return max((count for count in range(1, most + 1) if number % count == 0), default=1)
