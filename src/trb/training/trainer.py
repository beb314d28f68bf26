"""`TRBTrainer`: TRL's `DistillationTrainer` with two things replaced, how completions are sampled and the loss.

While the behavior policy needs the teacher, completions come from `trb.sampling.sample`, in process or inside vLLM
(`use_vllm=True`, colocate mode); afterwards from plain student sampling (then TRL's own vLLM path). The loss is the
reverse KL on the student's top-k.
Everything else (loop, sharding, PEFT, resume, logging, hub) is TRL's and transformers'.

TRL internals this module relies on, checked by a contract test against the installed version:
- `DistillationTrainer.__init__` accepts `teacher_model=None` and then leaves `self.teacher_model = None` to us
  (we prepare the teacher ourselves because TRL refuses heads padded to different sizes);
- `_tokenize_prompts(prompts)` returns token ids, images and multimodal fields of a batch of prompts;
- `_generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)` returns completion ids, stop token
  included; `_generate_and_score_completions(inputs)` calls it once per generation batch;
- `_compute_loss(unwrapped_student, inputs, num_items_in_batch)` returns (loss, summed entropy, token count) and runs
  inside the student's wrapper; `_forward_redirection` does the same for the teacher's;
- `eos_token_ids` are the stop ids of its own generation and of its metrics, and `vllm_generation.generation_kwargs` go
  into every request of its vLLM, in this process or served;
- `_get_train_sampler` yields each generation batch `gradient_accumulation_steps` times; `log` averages `_metrics`;
- `save_model` gathers sharded weights and calls `_save` where it should; Accelerate fills the last batch of an
  evaluation up and says so in `gradient_state`.

And of transformers, for runs that lose nothing (`trb.training.checkpoints`, `trb.training.guard`):
- `_save_checkpoint` writes into `_get_output_dir()`/checkpoint-N and rotates there; `_push_from_checkpoint` uploads it;
- `_save_rng_state` and `_load_rng_state` are called on every process when a checkpoint is saved and resumed from, the
  latter after `_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged` were set to zero;
- `_get_grad_norm` comes once per optimizer step, after clipping and right before `optimizer.step()`.

Shape suffixes: B sequences, P prompt length, T completion length, L = P + T.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import RepeatSampler, create_model_from_path

from trb.losses import ReverseKL, TokenBatch, TokenMetrics
from trb.models.loading import adapter_base, attach_adapter, check_model, load_tokenizer, resolve
from trb.models.modeling import OutputHead, completion_hidden_states, has_adapters, position_limit, without_adapters
from trb.policies import BehaviorPolicy, StudentPolicy, samples_student
from trb.records import PROGRESS, ROLLOUTS, SKIPPED, TRAINER_STATE, progress_name
from trb.safety.untrusted import check_checkpoint
from trb.sampling import SAMPLERS, Engine, Rollout, prompt_key, sample, stream_seed
from trb.sampling.scoring import TokenScores, score_completions
from trb.sampling.vllm import stopping_parameters
from trb.tasks.data import check_room, token_ids
from trb.training import checkpoints, resume
from trb.training.guard import NonFiniteError, StepGuard
from trb.training.methods import (
    BEHAVIORS,
    BUDGET_SCHEDULES,
    METHODS,
    TARGETS,
    behavior_of,
    halves,
    kl_budget_of,
    pair_of,
    target_of,
)
from trb.training.metrics import Observers, Sums
from trb.training.ranks import Ranks
from trb.training.recording import RunRecorder, score_record, survive_failures
from trb.training.sharding import (
    ExpireOnUpdate,
    Replica,
    check_sharding,
    leave_outputs_alone,
    shard_in_place,
    shards_parameters,
)
from trb.training.vllm import ReleaseEngine, WarmupEngine, deferred_generation
from trb.vocab import SharedVocabulary, check_same_tokenizer

__all__ = ["RewardFunction", "TRBConfig", "TRBTrainer"]

logger = logging.get_logger(__name__)

# Options of TRL and transformers that would change the sampled law, the prompts of a step or the loss, with the only
# value this trainer supports. A test classifies every option of the installed versions.
_UNSUPPORTED = {
    "beta": (1.0, "the loss is the reverse KL"),
    "top_p": (1.0, "completions are drawn from the exact law; truncating it is not supported"),
    "top_k": (0, "completions are drawn from the exact law; for the loss's support set loss_top_k"),
    "min_p": (None, "completions are drawn from the exact law; truncating it is not supported"),
    "repetition_penalty": (1.0, "completions are drawn from the exact law"),
    "generation_kwargs": (None, "trb's samplers take no generation options"),
    "cache_implementation": (None, "trb's samplers manage their own caches"),
    "vllm_structured_outputs_regex": (None, "completions are drawn from the exact law; a grammar would truncate it"),
    "label_smoothing_factor": (0.0, "the loss is the reverse KL, which has no labels"),
    "neftune_noise_alpha": (None, "the loss is taken at the policy that was sampled from, without noise"),
    "average_tokens_across_devices": (True, "the loss is the mean over the completion tokens of all processes"),
    "auto_find_batch_size": (False, "a step has as many rollouts as its batch; set per_device_train_batch_size"),
    "train_sampling_strategy": ("random", "each prompt is repeated for its rollouts; set shuffle_dataset"),
    "data_seed": (None, "the order of prompts follows seed"),
    "dataloader_in_order": (True, "rollouts are reused over accumulation steps, which takes batches in their order"),
}

# The dtype of what is sampled from under sharding; None is decided by the precision of training.
REPLICA_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A step after every warm-up.
_EVENTUALLY = 1 << 40

# Prompts handed to the tokenizer at once when they are measured.
_TOKENIZED_AT_ONCE = 1024

# Below this share of the student's probability, a top-k loss was seen to make the student worse (docs/experiments.md).
_THIN_SUPPORT = 0.5

RewardFunction = Callable[[list[str], Sequence[Mapping[str, Any]]], list[float]]


@dataclass
class TRBConfig(DistillationConfig):
    """Every knob of `TRBTrainer`, on top of TRL's `DistillationConfig`. Defaults are the paper's (section 6)."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Dropout off in training: the loss's support is chosen from the same model."},
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
    num_generations: int = field(default=4, metadata={"help": "Rollouts per prompt in an optimizer step."})
    initial_kl_budget: float = field(
        default=0.01, metadata={"help": "ε0 of trb and fixed: KL(behavior || student) per token, in nats."}
    )
    blend_warmup_steps: int = field(
        default=25,
        metadata={"help": "K of trb: optimizer steps until the budget is 0 and the teacher stops sampling."},
    )
    budget_schedule: str = field(
        default="linear", metadata={"help": "How trb's budget falls: linear (paper), cosine or constant."}
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
    sft_warmup_steps: int = field(
        default=25, metadata={"help": "sft: supervised updates on teacher completions before distillation."}
    )
    veto_strength: float = field(default=0.4, metadata={"help": "veto: b at step 0."})
    veto_steps: int | None = field(
        default=None, metadata={"help": "veto: optimizer steps until b is 0; None for the whole training."}
    )
    loss_top_k: int = field(
        default=16,
        metadata={"help": "Support of the loss: the student's k likeliest tokens; 0 for the vocabulary."},
    )
    loss_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens projected to the vocabulary at once in the loss: bounds its memory. None leaves the number "
            "to the device."
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
        default=600.0,
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

    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "The run stops when so many steps in a row had a loss or gradient that is not finite. Such steps "
            "are skipped, and saved in skipped/."
        },
    )
    checkpoint_checksums: bool = field(
        default=True,
        metadata={"help": "Checksums of checkpoints' contents, about 2 GB/s; false records and compares sizes only."},
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # On a machine with only a CPU the defaults of TRL (bf16, pinned memory) fail or warn at every run.
            self.use_cpu = True
            self.bf16 = bool(self.bf16)
            self.dataloader_pin_memory = False
        super().__post_init__()
        _check_choice("method", self.method, METHODS)
        for name, table in (("behavior", BEHAVIORS), ("loss", TARGETS)):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), table)
        _check_choice("budget_schedule", self.budget_schedule, BUDGET_SCHEDULES)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("replica_dtype", self.replica_dtype, REPLICA_DTYPES)
        for name, (supported, why) in _UNSUPPORTED.items():
            if getattr(self, name) != supported:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported ({why}); leave it at {supported!r}")
        if "chat_template" in (self.chat_template_kwargs or {}):
            raise ValueError(
                "chat_template_kwargs sets chat_template; set the tokenizer's chat_template instead (in recipes, "
                "chat_template with the name of a file)"
            )
        if self.max_completion_length is None:
            raise ValueError("max_completion_length=None is not supported; set the longest completion in tokens")
        for name in (
            "num_generations",
            "max_completion_length",
            "loss_chunk_tokens",
            "block_size",
            "max_skipped_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        recorded = ("recorded_rollouts", "recorded_alternatives", "recorded_scores_every")
        for name in ("loss_top_k", "sft_warmup_steps", "veto_strength", *recorded):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for half in halves():
            if all(hasattr(self, knob) for knob in half.knobs):  # those from outside may want another configuration
                half.build(self, lambda: 0).at(0)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def _check_choice(name: str, value: str, choices: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


class TRBTrainer(DistillationTrainer):
    """On-policy distillation with trust-region behavior blending, and every baseline of the paper.

    ```python
    trainer = TRBTrainer(
        model="Qwen/Qwen3-0.6B-Base",
        teacher_model="Qwen/Qwen3-4B",
        args=TRBConfig("runs/qwen3", initial_kl_budget=0.01, blend_warmup_steps=25),
        train_dataset=dataset,  # a "prompt" column, plain text or messages
    )
    trainer.train()
    ```

    Args:
        model: student; a path or hub id, or a loaded causal LM.
        teacher_model: teacher; the same, or a directory with a LoRA adapter, or a `PeftModel`. It must share the
            student's tokenizer; the head may be padded differently and the end-of-sequence id may differ.
        args: a `TRBConfig`.
        train_dataset: map-style dataset with a `"prompt"` column.
        eval_dataset: prompts on which `evaluate` reports the loss on student rollouts.
        processing_class: the tokenizer, padding on the left; loaded with the student when None.
        teacher_processing_class: the teacher's tokenizer, only to check that it is the same; loaded when
            `teacher_model` is a path or hub id.
        reward_fn: `(completions, rows) -> rewards`, logged and never trained on.
        callbacks, optimizers, quantization_config, peft_config: as in `DistillationTrainer`.

    Raises:
        ValueError: different tokenizers, a head without rows for ids in use, an unsupported option or kind of adapter,
            a student with a router loss, or a batch that `num_generations` does not divide.
    """

    _tag_names = ["trl", "trb"]  # noqa: RUF012
    _name = "TRB"
    _paper: dict[str, str] = {  # noqa: RUF012
        "title": "Trust-Region behavior Blending for On-Policy Distillation",
        "id": "2605.31159",
    }

    args: TRBConfig
    model: Any  # transformers declares it optional; it never is after construction

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel,
        args: TRBConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        reward_fn: RewardFunction | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(train_dataset, IterableDataset):
            raise ValueError("TRBTrainer repeats each prompt num_generations times and needs a map-style dataset")
        if kwargs.get("tools"):
            raise ValueError("TRBTrainer samples single turns; tools are not supported")
        model, processing_class = _checked_student(model, processing_class, args)
        with deferred_generation(args.vllm_request_timeout):
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        if self._is_vlm:
            raise ValueError(f"TRBTrainer handles text models only, got {type(self.model).__name__}")
        _check_router_loss(self.model)
        if self._global_batch() % args.num_generations:
            raise ValueError(
                f"the batch of one optimizer step is {self._global_batch()} completions (per_device_train_batch_size "
                f"x processes x gradient_accumulation_steps), which num_generations={args.num_generations} does not "
                "divide; change one of them"
            )
        self._ranks = Ranks.of_launch()
        self.behavior = behavior_of(args, self._training_steps)
        self.target = target_of(args, self._training_steps)
        if isinstance(teacher_model, str):
            if teacher_processing_class is None:
                teacher_processing_class = load_tokenizer(
                    teacher_model,
                    trust_remote_code=args.trust_remote_code,
                    revision=None if adapter_base(teacher_model) else args.teacher_model_revision,
                )
            teacher_model = _load_teacher(teacher_model, args, args.teacher_model_revision)
        else:
            _check_loaded(args)
        if teacher_processing_class is not None:
            check_same_tokenizer(self._tokenizer, teacher_processing_class)
        if shards_parameters(self.accelerator):
            check_sharding(self.accelerator, self.model, teacher_model)
            leave_outputs_alone(self.accelerator)
        self.vocabulary = self._shared_vocabulary(teacher_model, teacher_processing_class)
        self._stop_everywhere_at(self.vocabulary)
        # Before Accelerate wraps the forward in autocast: the check compares in the model's own precision.
        self._student_head = OutputHead.check(self.model)
        self._teacher_head = OutputHead.check(teacher_model)
        self._student_replica = self._replica()
        self._teacher_is_sharded = False
        self._warmup_engine: WarmupEngine | None = None
        if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_blended:
            self._warmup_engine = WarmupEngine(self.vllm_generation, self.model, teacher_model, args)
            self.add_callback(ReleaseEngine(self._warmup_engine))
        self.teacher_model = self._prepared_teacher(teacher_model)
        self.reward_fn = reward_fn
        self.recorder = RunRecorder(str(args.output_dir))
        self.add_callback(self.recorder)
        survive_failures(self.callback_handler.callbacks)
        self._guard = StepGuard(Path(str(args.output_dir)) / SKIPPED)
        self._loss_before = torch.zeros(())
        self._unfinished: Path | None = None
        self._resumed_from: Path | None = None
        self._description: dict[str, Any] | None = None
        self._prompts_checked = False
        self._rewards_work = False
        self._sums = {"train": Sums(), "eval": Sums()}
        self._observers = Observers({"behavior": self.behavior.schedule, "loss": self.target.schedule})
        self.add_callback(_ShowSteps(self._observers, self._ranks))
        self._rollout: Rollout | None = None

    # ---- set-up ----

    def _replica(self) -> Replica | None:
        """The student's whole copy to sample from, where training will shard the student."""
        if not shards_parameters(self.accelerator):
            if self.args.teacher_sharded:
                raise ValueError("teacher_sharded=True needs a launch with FSDP2 or ZeRO-3 (docs/distributed.md)")
            return None
        if self.args.teacher_sharded and self.behavior_policy(_EVENTUALLY).needs_teacher:
            raise ValueError(
                f"teacher_sharded=True saves nothing with behavior {pair_of(self.args)[0]}, whose sampler needs the "
                "whole teacher at every step; leave it at False"
            )
        mixed = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        dtype = REPLICA_DTYPES[self.args.replica_dtype] or mixed
        replica = Replica(self.model, device=self.accelerator.device, dtype=dtype)
        self.add_callback(ExpireOnUpdate(replica))
        return replica

    def _prepared_teacher(self, teacher: PreTrainedModel) -> nn.Module:
        teacher.requires_grad_(False)
        teacher.eval()  # for good: nothing trains it, and its dropout would make the target a draw
        if self._student_replica is not None:
            # Accelerate leaves placement to the sharding, which the teacher takes no part in.
            teacher.to(self.accelerator.device)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _shard_teacher(self) -> None:
        """Leave this process a shard of the teacher; collective. The head stays whole: the loss projects through it
        outside the teacher's own passes."""
        teacher, head = self.accelerator.unwrap_model(self.teacher_model), self._teacher_head
        if self.is_deepspeed_enabled:
            self._teacher_head = replace(head, projection=copy.deepcopy(head.projection))
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        else:
            self.teacher_model = shard_in_place(teacher, whole=head.projection, accelerator=self.accelerator)
        self._teacher_is_sharded = True

    def _shared_vocabulary(
        self, teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase | None
    ) -> SharedVocabulary:
        student, teacher = without_adapters(self.model), without_adapters(teacher)
        return SharedVocabulary.of_pair(student, teacher, self._tokenizer, teacher_tokenizer)

    def _stop_everywhere_at(self, vocabulary: SharedVocabulary) -> None:
        """Tell whatever else ends completions: TRL and its vLLM, and any engine that loads the saved student."""
        self.eos_token_ids = vocabulary.stop_ids
        without_adapters(self.model).generation_config.eos_token_id = vocabulary.stop_ids
        if self.use_vllm:
            self.vllm_generation.generation_kwargs |= stopping_parameters(vocabulary)

    def _global_batch(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _EpochSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=cast(Sized, self.train_dataset if dataset is None else dataset),
            mini_repeat_count=self.args.num_generations,
            batch_size=self._global_batch() // self.args.num_generations,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
        )

    def check_prompts(self) -> None:
        """Refuse prompts that would end the run later: fewer than one step needs, or too long for a model.

        `train` begins with it. Prompts for training and evaluation are tokenised as they will be sampled from, once.

        Raises:
            ValueError: names the dataset and the numbers, or the row.
        """
        if self._prompts_checked:
            return
        args, rows = self.args, len(cast(Sized, self.train_dataset))
        needed = self._global_batch() // args.num_generations
        if rows < needed:
            raise ValueError(
                f"train_dataset has {rows} prompts, fewer than the {needed} of one optimizer step: "
                f"per_device_train_batch_size={args.per_device_train_batch_size} x {self.accelerator.num_processes} "
                f"processes x gradient_accumulation_steps={args.gradient_accumulation_steps} completions, "
                f"num_generations={args.num_generations} of each prompt. Add prompts, or lower one of the first two"
            )
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else None
        evaluated = {f"eval_dataset[{key!r}]": rows for key, rows in (several or {}).items()}
        if several is None and self.eval_dataset is not None:
            evaluated = {"eval_dataset": self.eval_dataset}
        for name, dataset in {"train_dataset": self.train_dataset, **evaluated}.items():
            if not isinstance(dataset, IterableDataset):
                self._ranks.from_first(partial(self._check_room, name, dataset))
        self._prompts_checked = True

    def _check_room(self, name: str, dataset: Any) -> None:
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        limits = {
            f"the {role} ({type(without_adapters(model)).__name__})": position_limit(model)
            for role, model in (("student", self.model), ("teacher", teacher))
        }
        if self.use_vllm:
            limits["vLLM (vllm_max_model_length)"] = self.args.vllm_max_model_length
        if all(limit is None for limit in limits.values()):
            return
        prompts = [dataset[row]["prompt"] for row in range(len(dataset))]
        chunks = (prompts[start : start + _TOKENIZED_AT_ONCE] for start in range(0, len(prompts), _TOKENIZED_AT_ONCE))
        lengths = [len(ids) for chunk in chunks for ids in self._tokenize_prompts(chunk)[0]]
        check_room(lengths, name, int(self.max_completion_length or 0), limits, knob="max_completion_length")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine unless a hub name was given."""

    # ---- schedules ----

    def _training_steps(self) -> int:
        return self.state.max_steps

    def behavior_policy(self, step: int) -> BehaviorPolicy:
        """The policy that completions of optimizer step `step` (from 0) are drawn from."""
        return self.behavior.at(step)

    def _rollout_policy(self, step: int) -> BehaviorPolicy:
        """The policy of the rollouts at hand: evaluation is of the student."""
        return self.behavior_policy(step) if self.model.training else StudentPolicy()

    # ---- replaced: how completions are sampled ----

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if isinstance(prompts[0], str):
            return [token_ids(self._tokenizer, text) for text in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        training = self.model.training
        step = self.state.global_step
        policy = self._rollout_policy(step)
        engine = self._engine(step)
        if self._teacher_may_be_sharded(step):
            self._shard_teacher()
        if self.use_vllm and engine is None and samples_student(policy):
            self._rollout = None
            completions = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
            return [[self.vocabulary.event_of(token) for token in ids] for ids in completions]
        keys = [prompt_key(ids) for ids in prompt_ids]
        with self.compute_loss_context_manager():
            self._rollout = sample(
                self.sampling_student(),
                self.accelerator.unwrap_model(self.teacher_model) if policy.needs_teacher else None,
                prompt_ids,
                policy,
                max_new_tokens=cast(int, self.max_completion_length),
                eos_token_id=self.vocabulary.stop_ids,
                vocab_size=self.vocabulary.size,
                temperature=self.temperature,
                seed=stream_seed(self.args.seed, "train" if training else "eval", step),
                method=self.args.sampler,
                prompt_keys=keys,
                rollout_index=self._rollout_index(keys),
                max_rows=self.args.rollout_batch_size,
                block_size=self.args.block_size or "planned",
                keep_teacher_hidden=training,
                allow_non_finite=True,  # the loss meets them as well, and `guard` skips the step
                engine=engine,
            )
        return self._rollout.completions

    def sampling_student(self) -> PreTrainedModel:
        """The student to sample from: the model itself, or under FSDP2 and ZeRO-3 this process's whole copy of it.

        Under sharding the first call after an optimizer step is collective: every process must make it.
        """
        student = self.accelerator.unwrap_model(self.model_wrapped)
        if self._student_replica is None:
            return student
        self._student_replica.refresh(student)
        return cast(PreTrainedModel, self._student_replica.module)

    def _teacher_may_be_sharded(self, step: int) -> bool:
        """Whether the teacher waits to be sharded and no longer takes part in sampling."""
        if not self.args.teacher_sharded or self._teacher_is_sharded:
            return False
        return not self.behavior_policy(step).needs_teacher

    def _engine(self, step: int) -> Engine | None:
        """vLLM as long as training rollouts need the teacher (evaluation included); then its memory is given back."""
        if self._warmup_engine is None:
            return None
        if self.behavior_policy(step).needs_teacher:
            return self._warmup_engine.at_step(step)
        self._warmup_engine.release()
        return None

    def _rollout_index(self, keys: list[int]) -> list[int]:
        """How often each row's prompt has occurred before it in the global batch, over all processes in order."""
        everywhere = self._ranks.gather(keys)
        seen = Counter(chain.from_iterable(everywhere[: self._ranks.index]))
        index = []
        for key in keys:
            index.append(seen[key])
            seen[key] += 1
        return index

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        own = len(inputs) if mode == "train" else self._own_rows(len(inputs))
        output["completion_mask"][own:] = 0
        completions = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(output["completion_ids"][:own], output["completion_mask"][:own], strict=True)
        ]
        # Of no completions the tokenizer would make one text.
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
        rewards = self._rewards(texts, inputs[:own])
        known = [reward for reward in rewards or [] if not math.isnan(reward)]  # nan: the row has no answer
        self._add(mode, "reward", sum(known), len(known))
        self._add(mode, "completion_length", sum(map(len, completions)), len(completions))
        stopped = sum(bool(ids) and ids[-1] in self.vocabulary.stop_ids for ids in completions)
        self._add(mode, "stop_rate", stopped, len(completions))
        if self._rollout is not None:
            # The parent shuffles rows and splits them over accumulation steps; this says which is which.
            output["rollout_row"] = torch.arange(len(inputs), device=output["completion_ids"].device)
            self._add_rollout(mode, self._rollout)
            if mode == "train" and self.accelerator.is_main_process:
                self._record(texts, rewards)
        return output

    def _own_rows(self, rows: int) -> int:
        """How many of an evaluation batch's rows are new; the last batches are filled up with rows seen before, so that
        every process gets equally many."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - self._ranks.index * rows))

    def _rewards(self, texts: list[str], rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
        """Rewards are only logged: once they have worked, a grader that fails costs its numbers and not the run."""
        if self.reward_fn is None:
            return None
        try:
            rewards = self.reward_fn(texts, rows)
        except Exception as error:
            if not self._rewards_work:
                raise
            logger.warning(f"step {self.state.global_step}: no rewards, as their function failed: {error!r}")
            return [math.nan] * len(texts)
        self._rewards_work = True
        return rewards

    def _add_rollout(self, mode: str, rollout: Rollout) -> None:
        stats, budget = rollout.stats, kl_budget_of(self._rollout_policy(self.state.global_step))
        tokens = sum(map(len, rollout.completions))
        for name, rows in (
            ("teacher_weight", stats.teacher_weight),
            ("kl_student", stats.kl_student),
            ("kl_teacher", stats.kl_teacher),
            ("accept_rate", stats.accepted),
        ):
            if any(rows):
                self._add(mode, name, sum(map(sum, rows)), tokens)
        self._add(mode, "sequence_kl", sum(map(sum, stats.kl_student)), len(rollout.completions))
        if math.isfinite(budget):
            self._add(mode, "kl_budget", budget, 1)
        if budget > 0 and math.isfinite(budget):
            self._add(mode, "sequence_kl_bound", budget * tokens, len(rollout.completions))
        self._add(mode, "teacher_calls", rollout.teacher_calls, 1)
        self._add(mode, "student_calls", rollout.student_calls, 1)

    def _record(self, texts: list[str], rewards: list[float] | None) -> None:
        """Write the first rollouts of the step; runs on the main process, whose rows come first in the batch."""
        if self._rollout is None or self.state.global_step % max(1, self.state.logging_steps):
            return
        rows = min(self.args.recorded_rollouts, len(texts))
        prompts, completions = self._rollout.prompts[:rows], self._rollout.completions[:rows]
        # The same few tokens come again and again, and each call of the tokenizer costs more than what it decodes.
        text_of = cache(lambda token: self._tokenizer.decode([token]))
        stats, scores = self._rollout.stats, self._recorded_scores(prompts, completions)
        keys = [prompt_key(prompt) for prompt in prompts]
        self.recorder.write_rollouts(
            {
                "step": self.state.global_step,
                "prompt": self._tokenizer.decode(prompts[row], skip_special_tokens=False),
                "prompt_key": f"{keys[row]:016x}",
                "rollout_index": keys[:row].count(keys[row]),
                "completion": texts[row],
                "tokens": [text_of(token) for token in completions[row]],
                "reward": None if rewards is None else rewards[row],
                "teacher_weight": stats.teacher_weight[row],
                "kl_student": stats.kl_student[row],
                "accepted": stats.accepted[row],
                **({} if scores is None else score_record(scores, row, text_of)),
            }
            for row in range(rows)
        )

    def _recorded_scores(self, prompts: list[list[int]], completions: list[list[int]]) -> TokenScores | None:
        """What both models say at every token of the recorded rollouts; no draw, no gradient, nothing left changed."""
        every = self.args.recorded_scores_every * max(1, int(self.state.logging_steps))
        if not prompts or not every or self.state.global_step % every:
            return None
        if self._teacher_is_sharded:
            return None  # its weights are whole only inside a pass that every process makes
        with self.compute_loss_context_manager():
            return score_completions(
                self.sampling_student(),
                self.accelerator.unwrap_model(self.teacher_model),
                prompts,
                completions,
                policy=self.behavior_policy(self.state.global_step),
                vocabulary=self.vocabulary,
                temperature=self.temperature,
                top=self.args.recorded_alternatives,
            )

    # ---- replaced: the loss ----

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids_BL = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BL = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        completion_BL = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)
        student_NH = completion_hidden_states(unwrapped_student, ids_BL, mask_BL, completion_BL)
        teacher_NH = self._teacher_hidden(inputs, ids_BL, mask_BL, completion_BL)
        token_N = ids_BL[completion_BL.bool()]
        step = self.state.global_step
        if num_items_in_batch is not None and "num_items_in_batch" in inputs:
            # FSDP2 rounds floating-point arguments to the compute dtype on their way here; the count is an integer.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        # Evaluation is of the student against the teacher, whatever training matches.
        match = self.target.at(step) if self.model.training else ReverseKL(self.args.loss_top_k)
        loss, metrics = match(
            TokenBatch(
                student_NH,
                teacher_NH,
                self._student_head,
                self._teacher_head,
                token_N,
                vocabulary=self.vocabulary,
                temperature=self.temperature,
                normaliser=num_items_in_batch,
                chunk_tokens=self.args.loss_chunk_tokens,
            )
        )
        self._add_token_metrics(metrics)
        if self.model.training:
            self._guard.watch(inputs, metrics.reverse_kl)
        return loss, metrics.student_entropy.sum(), inputs["completion_mask"].sum()

    def _teacher_hidden(
        self, inputs: dict[str, Tensor], ids_BL: Tensor, mask_BL: Tensor, completion_BL: Tensor
    ) -> Tensor:
        """What the teacher's head reads at each completion token: from the sampler if the teacher took part in it."""
        kept = None if self._rollout is None else self._rollout.teacher_hidden
        if kept is not None and "rollout_row" in inputs:
            return torch.cat([kept[row] for row in inputs["rollout_row"].tolist()])
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            return self._forward_redirection(
                self.teacher_model, teacher, completion_hidden_states, teacher, ids_BL, mask_BL, completion_BL
            )

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, and also where that writes no model: under FSDP2 with sharded checkpoints, and with
        DeepSpeed before it has wrapped the model."""
        state = self.accelerator.state
        if not _internal_call and self.is_fsdp_enabled and "SHARDED" in str(state.fsdp_plugin.state_dict_type):
            weights = self.accelerator.get_state_dict(self.model)
        elif not _internal_call and self.is_deepspeed_enabled and self.model_wrapped is self.model:
            weights = None
        else:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """An adapter too is saved with the ids that end its completions, which its base may not know."""
        super()._save(output_dir, state_dict)
        if without_adapters(self.model) is not self.model:
            directory = self.args.output_dir if output_dir is None else output_dir
            GenerationConfig(eos_token_id=self.vocabulary.stop_ids).save_pretrained(str(directory))

    # ---- steps that must not be taken ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._guard.began:
            self._loss_before = self._tr_loss.clone()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Every gradient is there, and none was applied: the last moment to keep the optimizer from this step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        found = self._guard.judge(self.accelerator, grad_norm)
        if found:
            self._skip_step(model, found)
        self._guard.count(skipped=bool(found))
        self._guard.reset()
        return grad_norm

    def _skip_step(self, model: nn.Module, found: list[str]) -> None:
        """An optimizer finds no gradients, and changes nothing. The step counts all the same."""
        step, process = self.state.global_step + 1, self.accelerator.process_index
        path = self._guard.save(step, found, process, self._tokenizer.decode)
        what, in_a_row = " and ".join(found), self._guard.in_a_row + 1
        if self.is_deepspeed_enabled and not self.args.fp16:  # with fp16, its own loss scaling has skipped the step
            raise NonFiniteError(
                f"step {step}: {what} not finite, and DeepSpeed has applied the step already. {self._way_back(path)}"
            )
        if in_a_row >= self.args.max_skipped_steps:
            raise NonFiniteError(
                f"step {step}: {what} not finite, in max_skipped_steps={in_a_row} steps in a row. None of them was "
                f"applied. {self._way_back(path)}"
            )
        model.zero_grad(set_to_none=True)
        self._tr_loss.copy_(self._loss_before)
        logger.warning(f"step {step} is skipped: {what} not finite; its rollouts are in {path}")

    def _way_back(self, skipped: Path) -> str:
        saved = checkpoints.latest(Path(str(self.args.output_dir)), contents=False, warn=None)
        where = f"The last checkpoint is {saved}" if saved else "There is no checkpoint yet"
        return f"{where}; the rollouts of this step are in {skipped}. A lower learning_rate is the usual remedy"

    # ---- checkpoints ----

    def train(
        self,
        resume_from_checkpoint: Any = None,
        *args: Any,
        verify: bool = True,
        accept_changes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Train, as transformers' `Trainer.train`.

        `resume_from_checkpoint=True` takes the latest checkpoint of the output directory that is whole. `verify=False`
        trusts one that is named. A checkpoint of a run that differs in what changes results (`trb.training.resume` says
        what does: options, prompts, models) is refused; `accept_changes=True` warns and goes on.

        Raises:
            ValueError: prompts that cannot be trained on (`check_prompts`); a checkpoint that could run code.
            ChangedRunError: lists everything that differs from the checkpoint's run.
            CheckpointError: the checkpoint named is damaged or not one of this trainer's, or True finds no whole one.
            NonFiniteError: `max_skipped_steps` steps in a row had a loss or gradient that is not finite.
        """
        self.check_prompts()
        if not self._teacher_is_sharded:  # options may have changed since, and both models are whole
            self._description = None
        self._describe_run()
        self._guard.reset()
        if resume_from_checkpoint is True:
            # Never handed on as it is: transformers would choose by itself, and does not verify.
            resume_from_checkpoint = str(self._ranks.from_first(self._latest_checkpoint))
        elif resume_from_checkpoint and verify:
            named = Path(resume_from_checkpoint)
            self._ranks.from_first(lambda: checkpoints.verify(named))
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if resume_from_checkpoint:
            saved = Path(resume_from_checkpoint)
            check_checkpoint(saved)  # here too: DeepSpeed's files are not read as others are
            self.check_same_run(saved, accept_changes=accept_changes)
            if (
                saved.parent.absolute() == Path(str(self.args.output_dir)).absolute()
                and self.accelerator.is_main_process
            ):
                checkpoints.check_reach(saved)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _latest_checkpoint(self) -> Path:
        directory = Path(str(self.args.output_dir))
        found = checkpoints.latest(directory)
        if found is None:
            raise checkpoints.CheckpointError(
                f"{checkpoints.none_whole(directory)}; to start anew, call train() without resume_from_checkpoint"
            )
        return found

    def _describe_run(self) -> dict[str, Any]:
        """What this run is, for its checkpoints; collective the first time."""
        if self._description is None:
            describe = partial(
                resume.describe,
                self.args,
                world_size=self.accelerator.num_processes,
                train_dataset=self.train_dataset,
                tokenizer=self._tokenizer,
                vocabulary=self.vocabulary,
                student=self.model,
                teacher=self.accelerator.unwrap_model(self.teacher_model),
            )
            self._description = self._ranks.from_first(describe)
        return self._description

    def check_same_run(self, checkpoint: Path, *, accept_changes: bool = False) -> None:
        """Compare this run with a checkpoint's; collective. `train` does so before it resumes.

        Raises:
            ChangedRunError: lists everything that differs, unless `accept_changes` turns that into a warning.
        """
        saved = self._ranks.from_first(lambda: resume.read(checkpoint))
        if saved is None:
            logger.warning(f"{checkpoint} does not say which run it is of: its settings and data are not compared")
            return
        found = resume.differences(saved, self._describe_run(), length=resume.length_matters(self.args))
        if not found:
            return
        text = resume.explain(checkpoint, found, accepted=accept_changes)
        if not accept_changes:
            raise resume.ChangedRunError(text)
        logger.warning(text)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write it beside, seal it, and rename it into place; then remove those that `save_total_limit` leaves over."""
        directory = Path(self._get_output_dir(trial))
        step, name = self.state.global_step, f"checkpoint-{self.state.global_step}"
        if self.accelerator.is_local_main_process:
            checkpoints.clear_partial(directory)
        self.accelerator.wait_for_everyone()
        description = self._describe_run()
        self._unfinished = directory / checkpoints.PARTIAL
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(self._unfinished / name):
                self.state.best_model_checkpoint = str(directory / name)
                if self.args.should_save:
                    self.state.save_to_json(str(self._unfinished / name / TRAINER_STATE))
        finally:
            self._unfinished = None
        # The second round is for nodes whose disks are their own.
        for publishes in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            self.accelerator.wait_for_everyone()
            if publishes and (directory / checkpoints.PARTIAL / name).exists():
                resume.write(directory / checkpoints.PARTIAL / name, description)
                checkpoints.write_reach(directory, directory / checkpoints.PARTIAL / name)
                checkpoints.seal(directory / checkpoints.PARTIAL / name, checksums=self.args.checkpoint_checksums)
                checkpoints.publish(directory, name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.prune(directory, step, self.args.save_total_limit, [self.state.best_model_checkpoint])
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(directory / name))

    def _load_callback_state(self) -> None:
        """Called when the state has been read, and a best checkpoint forgotten that is not where it was."""
        super()._load_callback_state()
        if self._resumed_from is not None:
            saved = TrainerState.load_from_json(str(self._resumed_from / TRAINER_STATE))
            self.state.best_model_checkpoint = checkpoints.best_beside(self._resumed_from, saved.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """As in transformers, which loads it unseen: it may have been saved hours ago, or be named by another run."""
        best = Path(str(self.state.best_model_checkpoint))
        check_checkpoint(best)  # a resumed trainer_state.json may name any
        self._ranks.from_first(lambda: checkpoints.verify(best))
        super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else it is about to be renamed, and is pushed then
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        PROGRESS.write(self._progress_file(output_dir), self._progress())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path, progress = self._progress_file(checkpoint), None
        if path.exists():  # another trainer writes none, and fewer processes fewer
            progress = PROGRESS.read(path)
            self._go_on_from(progress)
        # The same on every process, of which there may be more now.
        self._observers.load_state_dict(self._ranks.from_first(lambda: (progress or {}).get("schedules", {})))

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / progress_name(self.accelerator.process_index)

    def _progress(self) -> dict[str, Any]:
        """What this process has added up since the last log, and counted since the first step: JSON keeps every bit."""
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "sums": self._sums["train"].state_dict(),
            "schedules": self._observers.state_dict(),
            "guard": self._guard.state(),
        }

    def _go_on_from(self, progress: Mapping[str, Any]) -> None:
        self._tr_loss.fill_(progress["loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self._metrics["train"].update(progress["metrics"])
        self._sums["train"].load_state_dict(progress["sums"])
        self._guard.load(progress["guard"])

    # ---- logging ----

    def _add(self, mode: str, name: str, total: float | Tensor, count: int) -> None:
        self._sums[mode].add(name, total, count)
        if mode == "train":
            self._observers.add(name, total, count)

    def _add_token_metrics(self, metrics: TokenMetrics) -> None:
        mode = "train" if self.model.training else "eval"
        tokens = metrics.reverse_kl.numel()
        for name in ("reverse_kl", "teacher_entropy", "teacher_log_prob", "support_mass"):
            self._add(mode, name, getattr(metrics, name).sum().item(), tokens)
        if samples_student(self._rollout_policy(self.state.global_step)):
            # The student is then its own behavior policy. Of another law without a teacher, nothing is known.
            self._add(mode, "kl_teacher", metrics.reverse_kl.sum().item(), tokens)
        if tokens and metrics.support_mass.mean() < _THIN_SUPPORT:
            logger.warning_once(
                f"the student's top {self.args.loss_top_k} tokens hold only {metrics.support_mass.mean():.0%} of its "
                "probability: the truncated loss can then drive probability into the tail. Set loss_top_k=0 (the full "
                "vocabulary), or a larger one, until the student is sharper"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self._sums[mode].take(self._ranks).items():
            self._metrics[mode][f"trb/{name}"] = [value]
        if "loss" in logs:
            self._metrics[mode]["trb/skipped_steps"] = [self._guard.skipped]
            logs["loss"] = self._guard.mean_loss(logs["loss"])
        super().log(logs, start_time)


class _ShowSteps(TrainerCallback):
    """Ends each optimizer step for the schedules that remember, before anything of it is saved."""

    def __init__(self, observers: Observers, ranks: Ranks) -> None:
        self._observers, self._ranks = observers, ranks

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._observers.end_step(state.global_step - 1, self._ranks)


class _EpochSampler(RepeatSampler):
    """TRL's order of prompts, as a function of seed and epoch: a run that starts in its third epoch has the third's."""

    def __init__(self, *, epoch: Callable[[], int], **options: Any) -> None:
        super().__init__(**options)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(cast(int, self.seed))
            for _ in range(self._epoch()):  # the permutations of the epochs before
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def _load_teacher(name: str, args: TRBConfig, revision: str | None) -> PreTrainedModel:
    adapted = adapter_base(name)
    if adapted is not None:
        base = _load_teacher(str(resolve(adapted[0])), args, adapted[1])
        if has_adapters(base):  # an adapter may stand on another one
            base = cast(Any, base).merge_and_unload()
        return attach_adapter(base, Path(name).expanduser())
    options: dict[str, Any] = dict(cast(dict, args.teacher_model_init_kwargs) or {})
    if revision is not None:
        options.setdefault("revision", revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    checked = check_model(name, trust_remote_code=options["trust_remote_code"], revision=options.get("revision"))
    return create_model_from_path(checked, **options)


def _checked_student(
    model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: TRBConfig
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The student, under the name of what was checked, and its tokenizer, loaded here where it was left out."""
    options: dict[str, Any] = dict(cast(dict, args.model_init_kwargs) or {})
    trust = options.get("trust_remote_code", args.trust_remote_code)
    name, revision = getattr(model, "name_or_path", ""), None
    if isinstance(model, str):
        revision = options.get("revision")
        name = model = check_model(model, trust_remote_code=trust, revision=revision)
    if tokenizer is None and name:
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)
        tokenizer.padding_side = tokenizer.truncation_side = "left"  # as TRL would
    return model, tokenizer


def _check_loaded(args: TRBConfig) -> None:
    """Refuse options of a teacher that is to be loaded, where one is given that is."""
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} does nothing for a teacher_model that is loaded already: load it so, "
                "or pass its path or hub id"
            )


def _check_router_loss(student: nn.Module) -> None:
    """Refuse a router loss that the library would add to its own loss, and this trainer to none."""
    config = without_adapters(student).config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if getattr(config, "output_router_logits", False) and coefficient:
        raise ValueError(
            f"{config.model_type}: output_router_logits=True asks for a router loss (router_aux_loss_coef="
            f"{coefficient}), which TRBTrainer does not train on; set model.config.output_router_logits=False"
        )
