"""`TRBTrainer`: TRL's `DistillationTrainer` with other rollouts and another loss.

While the behavior policy needs the teacher, completions come from `trb.sampling.sample`, in process or inside vLLM
(`use_vllm=True`, colocate mode); afterwards from plain student sampling (then TRL's own vLLM path). What a step's
policy and loss are is said in `trb.training.methods`.

Those two are replaced here. What else is touched has a part of its own, which lists its seams as this one does: the
order of prompts, also replaced (`trb.training.prompts`), tools (`trb.training.calling`), saving and resume
(`trb.training.saving`), steps that are not taken (`trb.training.guard`), metrics and records (`trb.training.logged`),
what the loss has of the teachers (`trb.training.taught`), the model card (`trb.training.card`), and TRL's vLLM
(`trb.training.vllm`). docs/architecture.md has all of them in one table, which a test holds to the classes. What is
refused is said in `trb.training.arguments`. The loop, sharding, PEFT, logging services and the hub are TRL's and
transformers'.

Seams of TRL overridden here, checked by a contract test against the installed version:
- `__init__` accepts `teacher_model=None` and then leaves `self.teacher_model = None` to us (we prepare the teacher
  ourselves because TRL refuses heads padded to different sizes);
- `_generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)` returns completion ids, stop token
  included; `_generate_and_score_completions(inputs)` calls it once per generation batch;
- `_compute_loss(unwrapped_student, inputs, num_items_in_batch)` returns (loss, summed entropy, token count) and runs
  inside the student's wrapper;
- `training_step(model, inputs, num_items_in_batch)` is one micro-batch, forward and backward, which may compute layers
  again: what `disable_dropout` switches off beyond TRL's `nn.Dropout` (`trb.models.draws`) is off until it ends;
- `autocast_smart_context_manager()` is what `compute_loss_context_manager` enters around a step's computing;
  transformers leave it to the forward that Accelerate wraps, and neither loss nor sampler goes through that;
- `hyperparameter_search` is refused, as it builds models anew; `_send_telemetry` is silenced;
- `_tag_names`, `_name` and `_paper` are what the model card and its tags say.

And used as they are: `eos_token_ids` are the stop ids of TRL's own generation and of its metrics;
`vllm_generation.generation_kwargs` go into every request of its vLLM, in this process or served; `_tokenizer` is what
the student reads with.

Shape suffixes: B sequences, P prompt length, T completion length, L = P + T.
"""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from trb.errors import InputError, OperationError
from trb.losses import ReverseKL
from trb.models.draws import check_draws_off, draws_off
from trb.models.modeling import OutputHead, completion_hidden_states, without_adapters
from trb.models.prefixes import shared_hidden_states
from trb.policies import BehaviorPolicy, StudentPolicy, samples_student
from trb.records import SKIPPED
from trb.sampling import Engine, Rollout, prompt_key, sample, stream_seed
from trb.sampling.vllm import shared_rows_parameters, stopping_parameters
from trb.tools.chats import check_template
from trb.tools.turns import LaterTurns
from trb.training.arguments import (
    TeacherArgument,
    check_arguments,
    chosen_teacher,
    chosen_tools,
    complete_config,
    teacher_prompts,
    teacher_routes,
)
from trb.training.calling import own_tokens
from trb.training.card import CardedTrainer
from trb.training.config import REPLICA_DTYPES, TRBConfig
from trb.training.guard import GuardedTrainer, StepGuard
from trb.training.logged import MeasuredTrainer, RewardFunction, ShowSteps
from trb.training.methods import (
    behavior_of,
    needs_teacher,
    pair_of,
    target_of,
)
from trb.training.metrics import Observers, Sums
from trb.training.pair import check_router_loss, check_trained, checked_student, loaded_teachers, teacher_tokenizers
from trb.training.ranks import Ranks
from trb.training.recording import RunRecorder, survive_failures
from trb.training.routes import Named
from trb.training.saving import ResumableTrainer
from trb.training.sharding import (
    ExpireOnUpdate,
    Replica,
    check_sharding,
    leave_outputs_alone,
    shards_parameters,
)
from trb.training.shares import blended_rows, from_teacher_prefixes
from trb.training.taught import TaughtTrainer, with_completions
from trb.training.teachers import drawn_by_teacher, shared_vocabulary
from trb.training.vllm import ReleaseEngine, WarmupEngine, deferred_generation
from trb.vocab import SharedVocabulary

__all__ = ["TRBTrainer"]

logger = logging.get_logger(__name__)


class TRBTrainer(ResumableTrainer, GuardedTrainer, MeasuredTrainer, TaughtTrainer, CardedTrainer):
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
            student's tokenizer; the head may be padded differently and the end-of-sequence id may differ. "base" is
            the model under the student's adapter, and "adapter:DIR" that model with another LoRA adapter; neither
            takes memory for weights again (`trb.models.sharing`). None takes `args.teacher_model_name_or_path`. A
            mapping of names has several, each for the rows that name it in `args.teacher_column`
            (`trb.training.teachers`).
        args: a `TRBConfig`; None for the defaults.
        train_dataset: map-style dataset with a `"prompt"` column: text, or messages without images. A column
            `"teacher_prompt"`, or `"privileged_context"`, has the teacher read another (`trb.training.privileged`).
        eval_dataset: prompts on which `evaluate` reports the loss on student rollouts.
        processing_class: the tokenizer, padding on the left; loaded with the student when None.
        teacher_processing_class: the teacher's tokenizer, only to check that it is the same; loaded when
            `teacher_model` is a path or hub id. Of several teachers one for all, or a mapping of names.
        reward_fn: `(completions, rows) -> rewards`, logged and never trained on; of a completion with tools, it reads
            what the model wrote, in all of its turns.
        **kwargs: `tools` (functions that the model may call: docs/tools.md), `callbacks`, `optimizers`,
            `quantization_config`, `peft_config`: as in `DistillationTrainer`, by name.

    Raises:
        ValueError: different tokenizers, a head without rows for ids in use, an unsupported option or kind of adapter,
            one for modules that are not there, a student with a router loss or with nothing to train, a teacher on
            weights that are trained, a batch that `num_generations` does not divide, prompts without the column, or an
            argument that would be ignored.
            Arguments, prompts and tokenizers are checked before a model is loaded.
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
        teacher_model: TeacherArgument | None = None,
        args: TRBConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        reward_fn: RewardFunction | None = None,
        **kwargs: Any,
    ) -> None:
        args = complete_config(args, model)
        teacher_model = chosen_teacher(teacher_model, args)
        check_arguments(
            args,
            model=model,
            teacher_model=teacher_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            teacher_processing_class=teacher_processing_class,
            reward_fn=reward_fn,
            others=kwargs,
        )
        kwargs["tools"] = chosen_tools(kwargs.get("tools"), args)
        self._teacher_prompts_of = teacher_prompts(args, train_dataset, eval_dataset)
        self._routes = teacher_routes(args, teacher_model, train_dataset, eval_dataset)
        model, processing_class = checked_student(model, processing_class, args)
        if kwargs["tools"]:
            check_template(processing_class)
        tokenizers = teacher_tokenizers(teacher_model, teacher_processing_class, args, processing_class)
        adapter = copy(kwargs.get("peft_config"))  # PEFT writes into its own
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
        check_router_loss(self.model)
        check_trained(self.model, adapter)
        self._ranks = Ranks.of_launch()
        self.behavior = behavior_of(args, self._training_steps)
        self.target = target_of(args, self._training_steps)
        self._set_up_models(teacher_model, tokenizers)
        self.reward_fn = reward_fn
        self._set_up_records()

    # ---- set-up ----

    def _set_up_models(self, teacher_model: TeacherArgument, tokenizers: Named) -> None:
        """The teachers, and what both models are sampled and scored with; the order of the steps matters."""
        args = self.args
        models = loaded_teachers(teacher_model, args, self.model, self.accelerator)
        if shards_parameters(self.accelerator):
            check_sharding(self.accelerator, self.model, *models.values())
            leave_outputs_alone(self.accelerator)
        self.vocabulary = shared_vocabulary(self.model, self._tokenizer, models, tokenizers)
        self._stop_everywhere_at(self.vocabulary)
        # Before Accelerate wraps the forward in autocast: the check compares in the model's own precision.
        self._student_head = OutputHead.check(self.model)
        heads = {name: OutputHead.check(model) for name, model in models.items()}
        if args.disable_dropout:
            check_draws_off(self.model)
        self._student_replica = self._replica()
        self._teacher_is_sharded = False
        self._warmup_engine: WarmupEngine | None = None
        if args.blends_in_vllm:
            # Of several teachers none is ever asked for there (`trb.training.arguments`).
            self._warmup_engine = WarmupEngine(self.vllm_generation, self.model, next(iter(models.values())), args)
            self.add_callback(ReleaseEngine(self._warmup_engine))
        self.teachers = [self._prepared_teacher(name, model, heads[name], tokenizers) for name, model in models.items()]
        self.teacher_model = self.teachers[0].model if self._routes is None else None

    def _set_up_records(self) -> None:
        """What is remembered of steps and rollouts, and who is told of them."""
        directory = str(self.args.output_dir)
        self.recorder = RunRecorder(directory)
        self.add_callback(self.recorder)
        survive_failures(self.callback_handler.callbacks)
        self._guard = StepGuard(Path(directory) / SKIPPED)
        self._loss_before = torch.zeros(())
        self._sums = {"train": Sums(), "eval": Sums()}
        self._observers = Observers({"behavior": self.behavior.schedule, "loss": self.target.schedule})
        self.add_callback(ShowSteps(self._observers, self._ranks))
        self._rollout: Rollout | None = None
        self._policy: BehaviorPolicy = StudentPolicy()
        self._all_own, self._of_both_kinds, self._blended = True, False, list[bool]()
        self._taught_by, self._scored = list[int](), cast(list[Tensor] | None, None)

    def _replica(self) -> Replica | None:
        """The student's whole copy to sample from, where training will shard the student."""
        if not shards_parameters(self.accelerator):
            if self.args.teacher_sharded:
                raise InputError("teacher_sharded=True needs a launch with FSDP2 or ZeRO-3 (docs/distributed.md)")
            return None
        if self.args.teacher_sharded and self.behavior.make(self.behavior.schedule.last()).needs_teacher:
            raise InputError(
                f"teacher_sharded=True saves nothing with behavior {pair_of(self.args)[0]}, whose sampler needs the "
                "whole teacher at every step; leave it at False"
            )
        dtype = REPLICA_DTYPES[self.args.replica_dtype] or REPLICA_DTYPES[self.args.autocast_dtype or "auto"]
        replica = Replica(self.model, device=self.accelerator.device, dtype=dtype)
        self.add_callback(ExpireOnUpdate(replica))
        return replica

    def _stop_everywhere_at(self, vocabulary: SharedVocabulary) -> None:
        """Tell whatever else ends completions: TRL and its vLLM, and any engine that loads the saved student."""
        self.eos_token_ids = vocabulary.stop_ids
        without_adapters(self.model).generation_config.eos_token_id = vocabulary.stop_ids
        if self.use_vllm:
            rows = without_adapters(self.model).config.get_text_config().vocab_size  # as vLLM counts them
            told = shared_rows_parameters(vocabulary, rows, served=self.args.vllm_mode == "server")
            self.vllm_generation.generation_kwargs |= stopping_parameters(vocabulary) | told

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine unless a hub name was given."""

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            "hyperparameter_search builds the model anew for each trial, from a model_init that is not taken here; "
            "build a TRBTrainer for each setting"
        )

    # ---- schedules ----

    def _training_steps(self) -> int:
        return self.state.max_steps

    # ---- what a step computes is what was sampled ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with draws_off(self.model) if self.args.disable_dropout else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    # ---- replaced: how completions are sampled ----

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        training = self.model.training
        step = self.state.global_step
        self._turns = None
        # Evaluation is of the student.
        policy = self._policy = self.behavior.at(step) if training else StudentPolicy()
        prefix = self.behavior.prefix.value(step) if training else 0.0
        self._all_own = samples_student(policy) and not prefix
        engine = None if prefix else self._engine(step)
        if self._teacher_may_be_sharded(step):
            self._shard_teacher()
        horizon = self._horizon(step)
        if self.use_vllm and engine is None and self._all_own and horizon == self.max_completion_length:
            self._rollout = None
            completions = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
            return [[self._drawn_event(token) for token in ids] for ids in completions]
        keys = [prompt_key(ids) for ids in prompt_ids]
        index = self._rollout_index(keys)
        share = 1.0 if self._all_own else self.behavior.share.value(step)
        self._of_both_kinds = share < 1
        self._blended = self._blended_rows(share, keys, index)
        policies = [policy if blended else StudentPolicy() for blended in self._blended]
        whose = [0] * len(prompt_ids) if self._routes is None or self._all_own else self._taught_by
        with self.compute_loss_context_manager():
            drawn = partial(
                self._drawn,
                prefix=prefix,
                student=self.sampling_student(),  # which may be collective; what follows is not
                seed=stream_seed(self.args.seed, "train" if training else "eval", step),
                max_new_tokens=horizon,
                keep_teacher_hidden=training and not prefix,
                engine=engine,
            )
            draw = partial(drawn_by_teacher, drawn)
            columns: dict[str, Any] = {"prompts": prompt_ids, "policy": policies, "prompt_keys": keys, "whose": whose}
            columns |= {"rollout_index": index, "teacher_prompts": self._teacher_prompts}
            # Where nothing follows, a copy of the student that it holds would outlive the step.
            self._later_turns = LaterTurns(draw, columns, horizon) if self.tools and not prefix else None
            self._rollout = draw(**columns)
        return [list(ids) for ids in self._rollout.completions]  # where there are tools, the rollout is continued

    def _drawn_event(self, token: int) -> int:
        """The event that TRL's vLLM has drawn; a server may draw rows that it was told to leave out."""
        if token >= self.vocabulary.size:
            raise OperationError(
                f"vLLM drew token id {token}, and the pair shares {self.vocabulary.size} rows of the student's head: "
                "save the student with a head of as many (resize_token_embeddings), and train from there"
            )
        return self.vocabulary.event_of(token)

    def _drawn(
        self,
        place: int,
        *,
        prefix: float,
        student: PreTrainedModel,
        teacher_prompts: list[list[int]] | None,
        policy: list[BehaviorPolicy],
        **options: Any,
    ) -> Rollout:
        """Completions of rows that have one teacher, by its place; `options` are those of `sample`."""
        teacher = self.teachers[place]
        taught = prefix > 0 or any(each.needs_teacher for each in policy)
        draw: Any = partial(
            sample,
            student,
            self.accelerator.unwrap_model(teacher.model) if taught else None,
            eos_token_id=self.vocabulary.stop_ids,
            vocab_size=self.vocabulary.size,
            temperature=self.temperature,
            method=self.args.sampler,
            max_rows=self.args.rollout_batch_size,
            block_size=self.args.block_size or "planned",
            allow_non_finite=True,  # the loss meets them as well, and `guard` skips the step
        )
        options["teacher_prompts"] = teacher_prompts if taught else None
        with teacher.present() if taught else nullcontext():
            if not prefix:
                return draw(policy=policy, **options)
            rows = {name: options.pop(name) for name in ("prompts", "rollout_index", "seed", "teacher_prompts")}
            keys = options.pop("prompt_keys")
            return from_teacher_prefixes(partial(draw, **options), share=prefix, keys=keys, **rows)

    def _horizon(self, step: int) -> int:
        """Tokens after which completions are cut."""
        longest = cast(int, self.max_completion_length)
        return int(min(longest, self.behavior.horizon.value(step))) if self.model.training else longest

    def _blended_rows(self, share: float, keys: list[int], index: list[int]) -> list[bool]:
        """Which rows have the step's policy; the others have the student's."""
        return blended_rows(
            share,
            generations=self.args.num_generations,
            keys=keys,
            rollout_index=index,
            seed=stream_seed(self.args.seed, "share", self.state.global_step),
        )

    def sampling_student(self) -> PreTrainedModel:
        """The student to sample from: the model itself, or under FSDP2 and ZeRO-3 this process's whole copy of it.

        Under sharding the first call after an optimizer step is collective: every process must make it.
        """
        student = self.accelerator.unwrap_model(self.model_wrapped)
        if self._student_replica is None:
            return student
        self._student_replica.refresh(student)
        return cast(PreTrainedModel, self._student_replica.module)

    def _engine(self, step: int) -> Engine | None:
        """vLLM as long as training rollouts need the teacher (evaluation included); then its memory is given back."""
        if self._warmup_engine is None:
            return None
        if needs_teacher(self.behavior, step):
            return self._warmup_engine.at_step(step)
        self._warmup_engine.release()
        return None

    def _rollout_index(self, keys: list[int]) -> list[int]:
        """How often each row's prompt has occurred before it in the global batch, over all processes in order; of an
        evaluation, in all of its batches so far."""
        everywhere = self._ranks.gather(keys)
        earlier = None if self.model.training else self._seen
        seen = Counter(chain(*everywhere[: self._ranks.index])) + (earlier or Counter())
        if earlier is not None:
            earlier.update(chain.from_iterable(everywhere))
        index = []
        for key in keys:
            index.append(seen[key])
            seen[key] += 1
        return index

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._teacher_prompts, self._scored = self._read_by_teacher(inputs), None
        self._taught_by = [0] * len(inputs) if self._routes is None else self._routes.of_rows(inputs, "the batch")
        output = super()._generate_and_score_completions(inputs)
        output |= self._padded_teacher_prompts()
        mode = "train" if self.model.training else "eval"
        own = len(inputs) if mode == "train" else self._own_rows(len(inputs))
        output["completion_mask"][own:] = 0
        completions = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(output["completion_ids"][:own], own_tokens(output)[:own], strict=True)
        ]
        # Of no completions the tokenizer would make one text.
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True) if completions else []
        rewards = self._rewards(texts, inputs[:own])
        known = [reward for reward in rewards or [] if not math.isnan(reward)]  # nan: the row has no answer
        self._add(mode, "reward", sum(known), len(known))
        self._add(mode, "completion_length", sum(map(len, completions)), len(completions))
        self._add_teachers_shares(mode, self._taught_by[:own])
        if self._rollout is None:
            stopped = [bool(ids) and ids[-1] in self.vocabulary.stop_ids for ids in completions]
        else:
            stopped = self._rollout.stopped[:own]
        self._add(mode, "stop_rate", sum(stopped), len(completions))
        # The parent shuffles rows and splits them over accumulation steps; this says which is which.
        output["rollout_row"] = torch.arange(len(inputs), device=output["completion_ids"].device)
        if mode == "train" and self.args.teacher_offload and not (self._rollout and self._rollout.teacher_hidden):
            self._scored = self._scored_ahead(output)
        if self._rollout is not None:
            self._add_rollout(mode, self._rollout)
            self._compare_rewards(mode, rewards)
            if mode == "train" and self.accelerator.is_main_process:
                self._record(texts, rewards)
        self._teacher_prompts = None
        return output

    # ---- replaced: the loss ----

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids_BL, mask_BL, completion_BL = with_completions(inputs, "prompt")
        read = completion_hidden_states if self._student_replica is not None else shared_hidden_states
        with draws_off(self.model) if self.args.disable_dropout and self.model.training else nullcontext():
            student_NH = read(unwrapped_student, ids_BL, mask_BL, completion_BL)
        step = self.state.global_step
        if num_items_in_batch is not None and "num_items_in_batch" in inputs:
            # FSDP2 rounds floating-point arguments to the compute dtype on their way here; the count is an integer.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        # Evaluation is of the student against the teacher, whatever training matches.
        match = self.target.at(step) if self.model.training else ReverseKL(self.args.loss_top_k)
        loss, metrics = self._matched(match, inputs, student_NH, num_items_in_batch)
        self._add_token_metrics(metrics)
        if self._rollout is not None and "rollout_row" in inputs:
            self._compare_tokens(metrics, inputs["rollout_row"], completion_BL)
        if self.model.training:
            self._guard.watch(inputs, metrics.reverse_kl)
        else:
            tokens = metrics.reverse_kl.numel()
            self._add("eval", "loss", loss.item() * tokens, tokens)
            self._add("eval", "entropy", metrics.student_entropy.sum(), tokens)
        return loss, metrics.student_entropy.sum(), completion_BL.sum()
