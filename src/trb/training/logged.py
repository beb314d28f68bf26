"""What a step is measured by: metrics of rollouts and tokens, rewards, and the few rollouts that are written down.

Seams of TRL and transformers:
- `log` averages `_metrics` of the mode that the model is in, and puts eval_ before those of an evaluation, whatever its
  prefix; with `log_completions` it prints and stores the texts in `_logs`;
- `evaluation_loop` returns the metrics of one evaluation: `evaluate` logs them, and `predict` does not; its loss is a
  mean over batches, and so is TRL's entropy;
- Accelerate fills the last batch of an evaluation up and says so in `gradient_state`.

Left out: sums over micro-batches and processes (`trb.training.metrics`), files (`trb.training.recording`), and logging
services.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.utils import logging

from trb.errors import InputError
from trb.losses.terms import TokenMetrics
from trb.models.generators import generators_kept
from trb.policies import BehaviorPolicy, StudentPolicy
from trb.safety.untrusted import printable
from trb.sampling import Rollout, prompt_key
from trb.sampling.scoring import TokenScores, score_completions
from trb.schedule import Constant
from trb.training.arguments import named_datasets
from trb.training.calling import CallingTrainer
from trb.training.config import TRBConfig
from trb.training.guard import StepGuard
from trb.training.methods import Behavior, kl_budget_of
from trb.training.metrics import Observers, Sums
from trb.training.ranks import Ranks
from trb.training.recording import RunRecorder, score_record
from trb.training.routes import Routes
from trb.training.shares import teacher_tokens
from trb.training.teachers import Teacher
from trb.vocab import SharedVocabulary

__all__ = ["MeasuredTrainer", "RewardFunction", "ShowSteps"]

logger = logging.get_logger(__name__)

RewardFunction = Callable[[list[str], Sequence[Mapping[str, Any]]], Sequence[float | None]]

# Of the rollouts of a step, by whether they are drawn from its policy.
_KINDS = (("blended", True), ("student", False))

# What is known of the rollouts of a step, until the next are drawn.
_OF_ROLLOUTS = (
    *("_rollout", "_policy", "_all_own", "_of_both_kinds", "_blended", "_taught_by", "_scored", "_teacher_prompts"),
    *("_turns", "_later_turns"),
)

# Below this share of the student's probability, a top-k loss was seen to make the student worse (docs/experiments.md).
_THIN_SUPPORT = 0.5


class MeasuredTrainer(CallingTrainer):
    """The part of `TRBTrainer` that measures and records."""

    args: TRBConfig
    model: Any
    vocabulary: SharedVocabulary
    recorder: RunRecorder
    _ranks: Ranks
    _guard: StepGuard
    _sums: dict[str, Sums]
    _observers: Observers
    _rollout: Rollout | None
    _teacher_prompts: list[list[int]] | None
    # Of the step's rollouts: their policy, whether all tokens are the student's own, whether a share is from the
    # policy and the rest from the student (on all processes together), and which of those at hand are the policy's.
    _policy: BehaviorPolicy
    _all_own: bool
    _of_both_kinds: bool
    _blended: list[bool]
    behavior: Behavior
    teachers: list[Teacher]
    _taught_by: list[int]
    _routes: Routes | None
    _teacher_is_sharded: bool
    reward_fn: RewardFunction | None
    _rewards_work: bool = False
    _mean_loss: float | None
    _seen: Counter[int] | None = None  # prompts of an evaluation's batches so far

    def sampling_student(self) -> PreTrainedModel:
        """The student to sample from."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in transformers; what was measured meanwhile is of this evaluation alone, and has its prefix. Loss and
        entropy are means over all tokens, however they were laid out in batches. The steps that follow draw what they
        would have drawn without it: loaders and graders draw too."""
        self._metrics["eval"].clear()
        self._sums["eval"], self._seen = Sums(), Counter()
        with self._rollouts_kept(), generators_kept():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._average("eval")
        metrics, measured = cast(dict[str, float | None], output.metrics), self._metrics["eval"]
        measured["entropy"] = measured.pop("trb/entropy", [])
        loss = f"{metric_key_prefix}_loss"
        if means := measured.pop("trb/loss", None):
            # One that is not finite is transformers' to show, or to leave out (`logging_nan_inf_filter`).
            metrics[loss] = means[0] if math.isfinite(metrics.get(loss) or 0.0) else metrics[loss]
        for name, values in self._metrics["eval"].items():
            known = [value for value in values if not math.isnan(value)]
            metrics[f"{metric_key_prefix}_{name}"] = sum(known) / len(known) if known else None
        self._metrics["eval"].clear()  # or `log` would add them again, as eval_
        return output

    @contextmanager
    def _rollouts_kept(self) -> Iterator[None]:
        """An evaluation between the micro-batches of a step, by a callback, leaves the rest its rollouts."""
        kept = {name: getattr(self, name) for name in _OF_ROLLOUTS} if self._guard.began else {}
        try:
            yield
        finally:
            vars(self).update(kept)

    def _average(self, mode: str) -> None:
        """Our numbers to those that `log` averages; collective."""
        for name, value in self._sums[mode].take(self._ranks).items():
            self._metrics[mode][f"trb/{name}"] = [value]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training step's, also where a callback has evaluated since
            self.model.train()
        mode = "train" if self.model.training else "eval"
        self._average(mode)
        if "loss" in logs:
            self._metrics[mode]["trb/skipped_steps"] = [self._guard.skipped]
            logs["loss"] = self._guard.mean_loss(logs["loss"])
        if "train_loss" in logs and self._mean_loss is not None:
            logs["train_loss"] = self._mean_loss
        for texts in self._logs.values():  # which `log_completions` prints as they are
            plain = [printable(text) for text in texts]
            texts.clear()
            texts.extend(plain)
        super().log(logs, start_time)

    def _add(self, mode: str, name: str, total: float | Tensor, count: int) -> None:
        self._sums[mode].add(name, total, count)
        if mode == "train":
            self._observers.add(name, total, count)

    def _add_token_metrics(self, metrics: TokenMetrics) -> None:
        mode = "train" if self.model.training else "eval"
        tokens = metrics.reverse_kl.numel()
        for name in ("reverse_kl", "teacher_entropy", "teacher_log_prob", "support_mass"):
            self._add(mode, name, getattr(metrics, name).sum().item(), tokens)
        if self._all_own:
            # The student is then its own behavior policy. Of another law without a teacher, nothing is known.
            self._add(mode, "kl_teacher", metrics.reverse_kl.sum().item(), tokens)
        if tokens and metrics.support_mass.mean() < _THIN_SUPPORT:
            # What is measured must stay out of the text: only the same one is said once.
            logger.warning_once(
                f"the student's top {self.args.loss_top_k} tokens hold less than {_THIN_SUPPORT:.0%} of its "
                "probability (trb/support_mass): the truncated loss can then drive probability into the tail. Set "
                "loss_top_k=0 (the full vocabulary), or a larger one, until the student is sharper"
            )

    def _add_teachers_metrics(self, name: str | None, metrics: TokenMetrics) -> None:
        """What was seen of the tokens of one of several teachers; TRL writes their names in this way."""
        if name is not None:
            mode = "train" if self.model.training else "eval"
            self._add(mode, f"teacher_reverse_kl/{name}", metrics.reverse_kl.sum().item(), metrics.reverse_kl.numel())

    def _add_teachers_shares(self, mode: str, whose: Sequence[int]) -> None:
        """Each of several teachers' share of the rows."""
        for place, teacher in enumerate(self.teachers if self._routes is not None else ()):
            self._add(mode, f"teacher_share/{teacher.name}", whose.count(place), len(whose))

    def _add_teachers_rollout(self, mode: str, rollout: Rollout) -> None:
        """Of the drafts beside each of several teachers, how many the sampler kept."""
        for place, teacher in enumerate(self.teachers if self._routes is not None else ()):
            blended = [its == place and blended for its, blended in zip(self._taught_by, self._blended, strict=True)]
            drawn = list(compress(rollout.stats.accepted, blended))
            if any(drawn):
                tokens = sum(map(len, compress(rollout.completions, blended)))
                self._add(mode, f"teacher_accept_rate/{teacher.name}", sum(map(sum, drawn)), tokens)

    def _add_rollout(self, mode: str, rollout: Rollout) -> None:
        """Of those drawn from the step's policy, where that is a share of them."""
        stats, budget = rollout.stats, kl_budget_of(self._policy)
        completions = list(compress(rollout.completions, self._blended))
        tokens = sum(map(len, completions))
        for name, rows in (
            ("teacher_weight", stats.teacher_weight),
            ("kl_student", stats.kl_student),
            ("kl_teacher", stats.kl_teacher),
            ("accept_rate", stats.accepted),
        ):
            drawn = list(compress(rows, self._blended))
            if any(drawn):
                self._add(mode, name, sum(map(sum, drawn)), tokens)
        self._add(mode, "sequence_kl", sum(map(sum, compress(stats.kl_student, self._blended))), len(completions))
        if math.isfinite(budget):
            self._add(mode, "kl_budget", budget, 1)
        if budget > 0 and math.isfinite(budget):
            self._add(mode, "sequence_kl_bound", budget * tokens, len(completions))
        if mode == "train":
            if self.behavior.share != Constant(1.0):
                blended = 0 if self._all_own else sum(self._blended)
                self._add(mode, "share", blended, len(self._blended))
            for name, value in self.behavior.schedule.readings().items():
                self._add(mode, name, value, 1)
        self._add_teachers_rollout(mode, rollout)
        self._add(mode, "teacher_calls", rollout.teacher_calls, 1)
        self._add(mode, "student_calls", rollout.student_calls, 1)

    def _compare_rewards(self, mode: str, rewards: Sequence[float] | None) -> None:
        """Rewards of blended rollouts and of the student's own apart, where a step has both."""
        if mode != "train" or rewards is None or not self._of_both_kinds:
            return
        for kind, wanted in _KINDS:
            known = [
                reward
                for reward, blended in zip(rewards, self._blended, strict=True)
                if blended == wanted and not math.isnan(reward)
            ]
            self._add(mode, f"reward_{kind}", sum(known), len(known))

    def _compare_tokens(self, metrics: TokenMetrics, rollout_row: Tensor, completion_BL: Tensor) -> None:
        """The teacher's log-probability of blended rollouts and of the student's own apart, where a step has both."""
        if not self.model.training or not self._of_both_kinds:
            return
        blended_B = torch.tensor([self._blended[row] for row in rollout_row.tolist()], device=rollout_row.device)
        blended_N = blended_B[:, None].expand_as(completion_BL)[completion_BL.bool()]
        for kind, wanted in _KINDS:
            log_prob_N = metrics.teacher_log_prob[blended_N == wanted]
            self._add("train", f"teacher_log_prob_{kind}", log_prob_N.sum().item(), log_prob_N.numel())

    def _rewards(self, texts: list[str], rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
        """Rewards are only logged: once they have worked, a grader that fails costs its numbers and not the run."""
        if self.reward_fn is None:
            return None
        try:
            rewards = _numbers(self.reward_fn(texts, rows), len(texts))
        except Exception as error:
            if not self._rewards_work:
                self._check_column(error, rows)
                raise
            said = printable(f"{error!r:.300}", lines=False)  # it may quote a completion
            logger.warning(f"step {self.state.global_step}: no rewards, as their function failed: {said}")
            return [math.nan] * len(texts)
        self._rewards_work = True
        if self.args.remove_unused_columns and rewards and all(map(math.isnan, rewards)):
            logger.warning_once(
                "no completion has a reward: remove_unused_columns=True takes columns such as answer out of the rows "
                "that reward_fn gets; leave it at False"
            )
        return rewards

    def _check_column(self, error: Exception, rows: Sequence[Mapping[str, Any]]) -> None:
        """Name the option that has taken a column out of the rows, if that is what a reward function fails of."""
        if not (isinstance(error, KeyError) and error.args and rows and self.args.remove_unused_columns):
            return
        column = error.args[0]
        data = [each for _, each in named_datasets(self.train_dataset, self.eval_dataset)]
        columns = [getattr(each, "column_names", None) or next(iter(each), ()) for each in data]
        if column not in rows[0] and any(column in names for names in columns):
            raise InputError(
                f"reward_fn reads the column {column!r}, which remove_unused_columns=True takes out of the rows; "
                "leave it at False"
            ) from error

    def _own_rows(self, rows: int) -> int:
        """How many of an evaluation batch's rows are new; the last batches are filled up with rows seen before, so that
        every process gets equally many."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - self._ranks.index * rows))

    def _record(self, texts: list[str], rewards: list[float] | None) -> None:
        """Write the first rollouts of the step; runs on the main process, whose rows come first in the batch."""
        if self._rollout is None or self.state.global_step % max(1, self.state.logging_steps):
            return
        rows = min(self.args.recorded_rollouts, len(texts))
        prompts, completions = self._rollout.prompts[:rows], self._whole_completions(self._rollout)[:rows]
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
                **self._recorded_teacher_prompt(row, prompts[row]),
                "blended": self._blended[row],
                "completion": texts[row],
                "tokens": [text_of(token) for token in completions[row]],
                "reward": None if rewards is None else rewards[row],
                "teacher_weight": self._among_answers(row, stats.teacher_weight[row]),
                "kl_student": self._among_answers(row, stats.kl_student[row]),
                "accepted": self._among_answers(row, stats.accepted[row]),
                **(self._recorded_numbers(row, score_record(*scores[row], text_of)) if scores else {}),
            }
            for row in range(rows)
        )

    def _recorded_numbers(self, row: int, record: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Of the tokens that are the model's own alone."""
        if self._turns is None:
            return dict(record)
        own = self._turns.own[row]
        return {
            name: [value if ours else None for value, ours in zip(values, own, strict=True)]
            for name, values in record.items()
        }

    def _recorded_teacher_prompt(self, row: int, prompt: list[int]) -> dict[str, str]:
        taught = prompt if self._teacher_prompts is None else self._teacher_prompts[row]
        text = self._tokenizer.decode(taught, skip_special_tokens=False)
        return {} if taught == prompt else {"teacher_prompt": cast(str, text)}

    def _recorded_scores(
        self, prompts: list[list[int]], completions: list[list[int]]
    ) -> list[tuple[TokenScores, int]] | None:
        """What both models say at every token of the recorded rollouts, with each one's place in it; no draw, no
        gradient, nothing left changed."""
        every = self.args.recorded_scores_every * max(1, int(self.state.logging_steps))
        if not prompts or not every or self.state.global_step % every:
            return None
        if self._teacher_is_sharded:
            return None  # its weights are whole only inside a pass that every process makes
        found: dict[int, tuple[TokenScores, int]] = {}
        taught = self._teacher_prompts
        begun = self._teacher_tokens(len(prompts))
        kinds = [(self._taught_by[row], self._blended[row]) for row in range(len(prompts))]
        for place, wanted in dict.fromkeys(kinds):
            rows = [row for row, kind in enumerate(kinds) if kind == (place, wanted)]
            teacher = self.teachers[place]
            with self.compute_loss_context_manager(), teacher.present():
                scores = score_completions(
                    self.sampling_student(),
                    self.accelerator.unwrap_model(teacher.model),
                    [prompts[row] for row in rows],
                    [completions[row] for row in rows],
                    teacher_prompts=taught and [taught[row] for row in rows],
                    teacher_tokens=[begun[row] for row in rows],
                    policy=self._policy if wanted else StudentPolicy(),
                    vocabulary=self.vocabulary,
                    temperature=self.temperature,
                    top=self.args.recorded_alternatives,
                )
            found |= {row: (scores, place) for place, row in enumerate(rows)}
        return [found[row] for row in range(len(prompts))]

    def _teacher_tokens(self, rows: int) -> list[int]:
        """How many first tokens of the first rows a teacher drew for the student to go on from."""
        if self._rollout is None or not self.behavior.prefix.value(self.state.global_step):
            return [0] * rows
        return teacher_tokens(self._rollout)[:rows]


def _numbers(rewards: Any, count: int) -> list[float]:
    """What a function of others gave as rewards, NaN where it gave None."""
    try:
        numbers = [math.nan if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward_fn gave {rewards!r:.80}; it must give one number per completion, or None where there is none"
        ) from error
    if len(numbers) != count:
        raise InputError(f"reward_fn gave {len(numbers)} rewards for {count} completions; it must give one for each")
    return numbers


class ShowSteps(TrainerCallback):
    """Ends each optimizer step for the schedules that remember, before anything of it is saved."""

    def __init__(self, observers: Observers, ranks: Ranks) -> None:
        self._observers, self._ranks = observers, ranks

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._observers.end_step(state.global_step - 1, self._ranks)
