"""What a training run leaves on disk beside its checkpoints: metrics and a few rollouts, as JSON lines.

metrics.jsonl has one object per logged optimizer step; held_out.jsonl one per evaluation of the loss, on the student's
own rollouts for held-out prompts (the behavior policy plays no part there); rollouts.jsonl a few rollouts with
per-token numbers and, from `trb.sampling.scoring`, the likeliest tokens under both models and the behavior policy. `trb
report` reads these files. A resumed run drops the lines after the checkpoint it starts from, so the files of a killed
and resumed run hold the same steps as those of an uninterrupted one. Logging services (W&B, TensorBoard, Trackio) stay
with `transformers`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

from trb.errors import InputError
from trb.records import HELD_OUT, MEASURED, METRICS, ROLLOUTS, SKIPPED, aside, named_step
from trb.safety.files import flush, write_bytes
from trb.safety.untrusted import printable
from trb.sampling.scoring import TokenScores

__all__ = [
    "RunRecorder",
    "drop_after_step",
    "logged_metrics",
    "read_records",
    "score_record",
    "survive_failures",
]

# Failures in a row, of one kind of event, after which a logging service is left alone: each may be a minute's time-out.
_PATIENCE = 3

logger = logging.get_logger(__name__)

_LOSS_OF_A_SET = re.compile("eval_(?P<name>.+)_loss")


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl, held_out.jsonl and rollouts.jsonl in the output directory; the last step is logged
    whatever `logging_steps` says."""

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.directory = Path(output_dir)
        self._untrained: list[dict[str, Any]] | None = []  # evaluations before the first training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            drop_after_step(self.directory / METRICS, state.global_step)
            # Of step 0 as well, where nothing is gone on with: it is of another student.
            drop_after_step(self.directory / HELD_OUT, state.global_step or -1)
            if not state.global_step and not args.eval_on_start and self._untrained:
                HELD_OUT.append(self.directory / HELD_OUT, self._untrained)
            self.drop_rollouts(state.global_step)
            for path in (self.directory / SKIPPED).glob("*"):
                if (named_step(path) or 0) > state.global_step:
                    path.unlink()
        self._untrained = None

    def drop_rollouts(self, step: int) -> None:
        """Of the step after `step` and later ones: they are drawn before their step's update, and will be again."""
        drop_after_step(self.directory / ROLLOUTS, step - 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.logging_strategy != "no" and state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            METRICS.append(self.directory / METRICS, [{"step": state.global_step, **logs}])
        if (evaluated := _evaluated(logs)) is not None:
            record = {"step": state.global_step, **evaluated}
            HELD_OUT.append(self.directory / HELD_OUT, [record])
            if self._untrained is not None:
                self._untrained.append(record)

    def write_rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rollout records; call on the main process only."""
        ROLLOUTS.append(self.directory / ROLLOUTS, rows)


def _evaluated(logs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an evaluation has logged, without the prefixes: eval_, or eval_NAME_ for transformers' numbers of one of
    several sets, whose name is kept beside them. None for other logs."""
    numbers = {key.removeprefix("eval_"): value for key, value in logs.items()}
    if "eval_loss" in logs:
        return numbers
    for name in (match["name"] for match in map(_LOSS_OF_A_SET.fullmatch, logs) if match):
        return {"set": name} | {key.removeprefix(f"{name}_"): value for key, value in numbers.items()}
    return None


def survive_failures(callbacks: Iterable[TrainerCallback]) -> None:
    """Let a logging service that fails cost its own records and not the run: metrics.jsonl has them all."""
    for callback in callbacks:
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            _Shield(callback)


class _Shield:
    """Replaces a callback's events on the callback itself, as transformers looks callbacks up by their class."""

    def __init__(self, callback: TrainerCallback) -> None:
        self.name, self.in_a_row = type(callback).__name__, Counter[str]()
        for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
            setattr(callback, event, self._shielded(event, getattr(callback, event)))

    def _shielded(self, event: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if max(self.in_a_row.values(), default=0) >= _PATIENCE:
                return None
            try:
                result = handler(*args, **kwargs)
            except Exception as error:
                self.in_a_row[event] += 1
                given_up = ", and is left alone from now on" if self.in_a_row[event] == _PATIENCE else ""
                said = printable(f"{error!r:.300}", lines=False)
                logger.warning(f"{self.name} failed in {event}{given_up}: {said}. The run goes on")
                return None
            self.in_a_row[event] = 0
            return result

        return call


def score_record(scores: TokenScores, row: int, decode: Callable[[int], str]) -> dict[str, Any]:
    """What rollouts.jsonl keeps of one row's scores: log-probabilities and KL(μ || teacher) of its tokens in nats, and
    the alternatives as [text, probability] under each law, likeliest first."""
    numbers = ("student_log_prob", "teacher_log_prob", "kl_teacher")
    record: dict[str, Any] = {name: [_short(value) for value in getattr(scores, name)[row]] for name in numbers}
    if scores.alternatives is not None:
        record["alternatives"] = [
            {law: [[decode(token), _short(chance)] for token, chance in found] for law, found in laws.items()}
            for laws in scores.alternatives[row]
        ]
    return record


def _short(value: float) -> float:
    """Six digits: there are dozens of these numbers to a token, and forward passes are not exact to more."""
    return float(f"{value:.6g}")


def logged_metrics(path: Path, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Name -> optimizer step -> value, read once from a metrics.jsonl; nulls and absent values are passed over.

    Of a step recorded twice (a resumed run) the later record counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line before the last is no record; half a last line is what a running or killed run leaves.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for line in METRICS.lines(path):
        if line.is_torn:
            break
        try:
            if not METRICS.fits(line.record):
                raise InputError(line.error or f"step is {line.record.get('step')!r:.40}")
            for name in names:
                if line.record.get(name) is not None:
                    found[name][line.record["step"]] = float(line.record[name])
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(
                f"line {line.number} of {path} is no metrics record ({error!r}); repair or remove it"
            ) from error
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, each with its optimizer `step`; none if there is no file.

    Half a last line is what a kill leaves. Others that cannot be read are left out, with a warning that names them.
    """
    records, damaged = _sorted_out(path)
    if damaged:
        logger.warning(f"{_damage(path, damaged)}; what can be read of it is used")
    return [record for _, record in records]


def drop_after_step(path: Path, step: int) -> None:
    """Rewrite `path` without objects whose `"step"` exceeds `step`, and without a torn last line.

    Other lines that cannot be read are moved to a file beside it (its name and `.damaged`), with a warning that names
    them.
    """
    if not path.exists():
        return
    records, damaged = _sorted_out(path)
    if damaged:
        beside = aside(path)
        with beside.open("ab") as file:  # before they leave their place
            file.writelines(line + b"\n" for line in damaged.values())
        flush(beside)
        logger.warning(f"{_damage(path, damaged)}; moved to {beside.name}")
    write_bytes(path, b"".join(line + b"\n" for line, record in records if record["step"] <= step))


def _sorted_out(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], dict[int, bytes]]:
    """The lines of a file that are records of a step, and by their numbers those that are not, but for a torn last."""
    records, damaged = [], {}
    for line in MEASURED.lines(path) if path.exists() else ():
        raw = line.raw.removesuffix(b"\n")
        if MEASURED.fits(line.record):
            records.append((raw, line.record))
        elif line.raw.endswith(b"\n"):
            damaged[line.number] = raw
    return records, damaged


def _damage(path: Path, damaged: Mapping[int, bytes]) -> str:
    numbers = ", ".join(map(str, list(damaged)[:10])) + (", ..." if len(damaged) > 10 else "")
    return f"{path} is damaged: line {numbers} cannot be read"
