"""vLLM in a training process (TRL's colocate mode): blended rollouts in the warm-up, plain student rollouts after it.

`WarmupEngine` holds the engine of the warm-up, starts it at the first rollout, gives it the student's weights once
per optimizer step and gives its memory back when the warm-up ends. `DeferredGeneration` is TRL's own vLLM, started
only then, so that the two never hold memory together.

Seams of TRL, checked by a contract test: `DistillationTrainer` builds `VLLMGeneration` under that name, whose
`__init__` ends with `_init_vllm()`; `sync_weights()` and `generate(...)` are all that is called of it; and
`_iter_named_params()` yields whole parameters under their checkpoint names, on every process, for DDP, FSDP, DeepSpeed
and PEFT. `VLLMClient` waits with `check_server(...)` and asks with `generate(...)`, both through its `session`.

Left out on purpose: TRL's server mode, whose server samples from the student only (docs/vllm.md says how to serve
blended rollouts).
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any, Unpack
from urllib.parse import urlencode

from transformers import AutoConfig, PreTrainedModel, TrainerCallback
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import distillation_trainer

from trb.errors import InputError, OperationError, ServerError
from trb.models.bases import is_merged
from trb.models.generators import generators_kept
from trb.models.identity import checkpoint_of
from trb.models.modeling import has_adapters, without_adapters
from trb.policies import BehaviorPolicy
from trb.sampling import Engine, EngineOptions, Rollout
from trb.sampling.vllm import (
    BlendEngine,
    check_runner,
    drafting_room,
    repack_heads,
    require_supported_version,
)
from trb.sampling.vllm.served import REQUEST_SECONDS, Answer, ask, check_completion
from trb.training.ranks import Ranks

__all__ = [
    "BoundedClient",
    "DeferredGeneration",
    "ReleaseEngine",
    "SharedEngine",
    "WarmupEngine",
    "deferred_generation",
]

# Tokens drafted at once where `block_size` leaves the choice open: with the paper's budgets four in five are kept.
_BLOCK = 4


class WarmupEngine:
    """The blended engine of a training run.

    Args:
        generation: TRL's vLLM of the same run, of which only the iteration over the student's parameters is used.
        student: the model in training, PEFT wrapper included.
        teacher: as loaded, before it was wrapped.
        args: a `TRBConfig`.

    Raises:
        ImportError: a vLLM whose internals the plugin does not know.
    """

    def __init__(self, generation: VLLMGeneration, student: Any, teacher: PreTrainedModel, args: Any) -> None:
        require_supported_version()
        self._ranks, self._shared_by = Ranks.of_launch(), args.vllm_tensor_parallel_size
        self._generation, self._student, self._teacher, self._args = generation, student, teacher, args
        self._engine: BlendEngine | None = None
        self._step: int | None = None

    def at_step(self, step: int) -> Engine:
        """The engine with the student's weights of optimizer step `step`; every process calls this together."""
        if self._engine is None:
            self._engine = self._start()
        if step != self._step:
            self._engine.update_student(self._generation._iter_named_params())
            self._step = step
        return self._engine if self._shared_by == 1 else SharedEngine(self._engine, self._ranks, self._shared_by)

    def release(self) -> None:
        """Give the engine's memory back, if it is running."""
        if self._engine is not None:
            self._engine.release()
            self._engine = self._step = None

    def _start(self) -> BlendEngine:
        args, block = self._args, self._args.block_size or _BLOCK
        length, several = args.vllm_max_model_length, self._ranks.count > 1
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        with ExitStack() as stack:
            return BlendEngine(
                stack.enter_context(_configuration(self._student)),
                stack.enter_context(_teacher_checkpoint(self._teacher, several)),
                weights_follow=True,
                num_speculative_tokens=block,
                max_model_len=None if length is None else length + drafting_room(block),
                max_num_seqs=rows * self._shared_by,
                tensor_parallel_size=self._shared_by,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                dtype=_dtype(args, self._student),
                model_impl=args.vllm_model_impl,
                # On a CPU compiling takes longer than the rollouts of most warm-ups there.
                enforce_eager=self._generation.accelerator.device.type == "cpu",
                trust_remote_code=args.trust_remote_code,
                distributed_executor_backend="external_launcher" if several else None,
            )


@dataclass(frozen=True)
class SharedEngine:
    """An engine whose models are split over `size` processes in a row, which sample together.

    Each of them hands it the rows of all and keeps its own. A completion does not depend on which rows are sampled
    beside it, so sharing changes nothing else.
    """

    engine: Engine
    ranks: Ranks
    size: int

    def sample(
        self, prompts: Sequence[Sequence[int]], policies: Sequence[BehaviorPolicy], **options: Unpack[EngineOptions]
    ) -> Rollout:
        """As `Engine.sample`; every process of the launch calls it together."""
        own = (list(prompts), list(policies), list(options["prompt_keys"]), list(options["rollout_index"]))
        first = self.ranks.index // self.size * self.size
        parts = self.ranks.gather(own)[first : first + self.size]
        everyones, behaviors, keys, index = (list(chain.from_iterable(column)) for column in zip(*parts, strict=True))
        shared: EngineOptions = {**options, "prompt_keys": keys, "rollout_index": index}
        start = sum(len(rows) for rows, *_ in parts[: self.ranks.index - first])
        return self.engine.sample(everyones, behaviors, **shared).rows(start, start + len(own[0]))


def _dtype(args: Any, student: Any) -> str:
    """What the models compute in: autocast's dtype, or the student's own."""
    return args.autocast_dtype or str(student.dtype).removeprefix("torch.")


@contextmanager
def _configuration(student: Any) -> Iterator[str]:
    """A directory with the student's shape, which may differ from that of the checkpoint it was loaded from."""
    with tempfile.TemporaryDirectory(prefix="trb-vllm-") as directory:
        without_adapters(student).config.save_pretrained(directory)
        yield directory


@contextmanager
def _teacher_checkpoint(teacher: PreTrainedModel, several: bool) -> Iterator[str]:
    adapted = has_adapters(teacher)  # its name is that of the base, without them; so it is once they are merged
    if not adapted and not is_merged(teacher) and (checkpoint := checkpoint_of(teacher)) is not None:
        yield checkpoint
        return
    if several:  # transformers writes on the first process alone, and nodes need not share a disk
        name = teacher.name_or_path
        what = f"has other weights than {name}" if name else "was not loaded from a directory or the hub"
        what = "has adapters" if adapted or is_merged(teacher) else what
        raise InputError(
            f"the teacher {what}, so several processes cannot give it to their engines: save it as a whole model "
            "(merge_and_unload, save_pretrained) and load it from there, or set vllm_blended=False"
        )
    with tempfile.TemporaryDirectory(prefix="trb-vllm-") as directory:
        _merged(teacher).save_pretrained(directory)
        yield directory


def _merged(model: Any) -> PreTrainedModel:
    """The model with its adapters in its weights, in a copy."""
    if not has_adapters(model):
        return model
    if not hasattr(model, "merge_and_unload"):
        raise InputError(
            f"{type(model).__name__} has adapters in place and no PEFT wrapper that could merge them for vLLM: pass "
            "the PeftModel, or set vllm_blended=False"
        )
    without_adapters(model)  # refuses kinds that do not merge
    return copy.deepcopy(model).merge_and_unload()


class ReleaseEngine(TrainerCallback):
    """Ends the warm-up's engine with a training that ends before the warm-up does."""

    def __init__(self, engine: WarmupEngine) -> None:
        self._engine = engine

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._engine.release()


class DeferredGeneration(VLLMGeneration):
    """TRL's vLLM, which a colocated run starts when it is first used; what it would refuse then is refused at once.

    Of a server, one request takes `request_timeout` seconds at most, and its completions are checked before use.
    """

    _started = False

    def __init__(self, *args: Any, request_timeout: float = REQUEST_SECONDS, **kwargs: Any) -> None:
        self.request_timeout = request_timeout
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.mode == "colocate":
            _check_shape(without_adapters(self.model), self.trust_remote_code)
            _check_sharing(self.tensor_parallel_size, self.accelerator.num_processes)
        else:
            self._start()

    def _start(self) -> None:
        if not self._started:
            if self.mode == "colocate":
                check_runner(self.generation_kwargs)
            rows = without_adapters(self.model).config.get_text_config().vocab_size
            client = partial(BoundedClient, rows=rows, request_timeout=self.request_timeout)
            with generators_kept(), _replaced(vllm_generation, "VLLMClient", client):
                super()._init_vllm()
            self._started = True

    def sync_weights(self) -> None:
        self._start()
        if self.mode == "colocate" and self.accelerator.device.type == "cpu":
            # On a CPU vLLM repacks its linear layers, which TRL's way of loading does not expect.
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._iter_named_params()})
            repack_heads(self.llm.llm_engine.model_executor.driver_worker.model_runner.model)
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        self._start()
        return super().generate(*args, **kwargs)


class BoundedClient(VLLMClient):
    """TRL's client of a vLLM server, for a server that may be broken, or somebody else's.

    Args:
        rows: how many token ids the student has.
        request_timeout: seconds one request may take.

    Raises:
        TimeoutError: a request took longer than `request_timeout` seconds.
        ConnectionError: the server could not be reached.
        RuntimeError: it answered something else than the completions that were asked for.
    """

    def __init__(self, *args: Any, rows: int, request_timeout: float, **kwargs: Any) -> None:
        self._rows, self._seconds = rows, request_timeout
        super().__init__(*args, **kwargs)

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Wait for the server; the session, which has no time-out and reads without end, is exchanged first."""
        self.session: Any = _Session(self._seconds)
        give_up = time.monotonic() + total_timeout
        while True:
            left = max(retry_interval, give_up - time.monotonic())
            try:
                if ask(f"{self.base_url}/health", seconds=min(left, self._seconds)).status_code == 200:
                    return
                found = "it is not ready"
            except (TimeoutError, ConnectionError) as error:
                found = str(error)
            if time.monotonic() + retry_interval >= give_up:
                raise ServerError(
                    f"the vLLM server at {self.base_url} was not up in vllm_server_timeout={total_timeout:g}: {found}"
                )
            time.sleep(retry_interval)

    def generate(self, prompts: list, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        n = kwargs["n"]
        stop_ids = (kwargs.get("generation_kwargs") or {}).get("stop_token_ids", ())
        try:
            output = super().generate(prompts, **kwargs)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise OperationError(f"{self.base_url} answered something else than completions: {error!r:.300}") from error
        completions = output["completion_ids"]
        if len(completions) != n * len(prompts) or output["prompt_ids"] != prompts:
            raise OperationError(
                f"{self.base_url} answered {len(completions)} completions of {len(output['prompt_ids'])} prompts; "
                f"{n} of each of {len(prompts)} prompts were asked for, and these prompts"
            )
        for row, completion in enumerate(completions):
            check_completion(
                completion,
                where=f"{self.base_url}: prompt {row // n}",
                rows=self._rows,
                stop_ids=stop_ids,
                max_new_tokens=kwargs["max_tokens"],
            )
        return output


class _Session:
    """What TRL's client uses of a session of `requests`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def get(self, url: str, params: Mapping[str, str] | None = None) -> Answer:
        return ask(f"{url}?{urlencode(params)}" if params else url, seconds=self._seconds, patient=True)

    def post(self, url: str, json: Any = None) -> Answer:
        return ask(url, json, seconds=self._seconds, post=True, patient=True)


def _check_shape(student: PreTrainedModel, trust_remote_code: bool) -> None:
    """Raises ValueError for a student unlike its checkpoint: TRL's engine is started from that, and a pruned student's
    weights would then fill only some of the engine's layers."""
    path, here = student.name_or_path, student.config.get_text_config().num_hidden_layers
    remedy = "save the student (save_pretrained), its tokenizer beside it, and train from there, or set use_vllm=False"
    if not path:
        raise InputError(
            f"use_vllm=True starts vLLM from the student's checkpoint, and this student has none: {remedy}"
        )
    saved = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config().num_hidden_layers
    if saved != here:
        raise InputError(
            f"use_vllm=True starts vLLM from the student's checkpoint {path}, which has {saved} layers; the student "
            f"was pruned to {here}: {remedy}"
        )


def _check_sharing(size: int, processes: int) -> None:
    if processes % size:
        raise InputError(
            f"vllm_tensor_parallel_size={size} does not divide the number of processes, {processes}: an engine is "
            "shared by so many of them"
        )


@contextmanager
def deferred_generation(request_timeout: float) -> Iterator[None]:
    """Have `DistillationTrainer` build a `DeferredGeneration`."""
    build = partial(DeferredGeneration, request_timeout=request_timeout)
    with _replaced(distillation_trainer, "VLLMGeneration", build):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
