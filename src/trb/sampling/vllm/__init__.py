"""Blended sampling inside vLLM: an engine with the student as its draft model and the teacher as its target.

`BlendEngine` is the front: it starts the engine, hands it prompts with the policy of the moment, takes the completions
and what the samplers saw at every token, and gives the draft model new weights. `trb.sampling.sample(..., engine=...)`
is the call. The rule is in `trb.sampling.vllm.verification`, what is replaced inside vLLM in
`trb.sampling.vllm.plugin`.

Left out on purpose: plain student sampling after the warm-up, which is TRL's own vLLM path.
"""

import gc
import json
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from trb.errors import InputError, OperationError
from trb.models.generators import generators_kept
from trb.policies import BehaviorPolicy
from trb.sampling.rollout import EngineOptions, Rollout, RolloutStats
from trb.sampling.vllm.plugin import (
    EXTENSION,
    REQUEST_KEY,
    drafting_room,
    process_group_kept,
    register,
    repack_heads,
    require_supported_version,
)
from trb.sampling.vllm.served import REQUEST_SECONDS, ask, check_completion, check_numbers
from trb.sampling.vllm.verification import BlendRequest
from trb.vocab import SharedVocabulary

__all__ = [
    "SERVER_ENVIRONMENT",
    "BlendEngine",
    "ServedEngine",
    "check_runner",
    "drafting_room",
    "engine_options",
    "repack_heads",
    "require_supported_version",
    "rollout_of",
    "sampling_parameters",
    "serve_command",
    "shared_rows_parameters",
    "stopping_parameters",
]

_COLUMNS = tuple(RolloutStats.__dataclass_fields__)
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
# What a server needs: the first model runner, and the routes over which records are taken and weights are loaded. Those
# let anyone who reaches the port call methods of the workers: keep it inside a trusted network.
SERVER_ENVIRONMENT = {_RUNNER: "0", "VLLM_SERVER_DEV_MODE": "1"}
# What vLLM's second model runner takes of one request, and refuses amid the work (MAX_NUM_LOGIT_BIAS_TOKENS).
MOST_BIASES = 1024
# How long a separate process may take to end before it is killed.
_SHUTDOWN_SECONDS = 30.0
_SEPARATE = "VLLM_ENABLE_V1_MULTIPROCESSING"


def engine_options(student: str, teacher: str, num_speculative_tokens: int) -> dict[str, Any]:
    """The options of vLLM that make an engine a blended one."""
    return {
        "model": teacher,
        "speculative_config": {
            "model": student,
            "method": "draft_model",
            "num_speculative_tokens": num_speculative_tokens,
        },
        "worker_extension_cls": EXTENSION,
        "async_scheduling": False,
        "skip_tokenizer_init": True,
    }


def serve_command(student: str, teacher: str, num_speculative_tokens: int) -> list[str]:
    """The command that serves the same engine over HTTP, for `ServedEngine`; further options of vLLM may follow.

    It is reached from this machine alone, unless another `--host` follows: vLLM asks nobody who they are.
    It needs `SERVER_ENVIRONMENT`. vLLM's module, because its `vllm` command does not start in the build for CPUs.
    """
    options = engine_options(student, teacher, num_speculative_tokens)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", teacher),
        *("--speculative-config", json.dumps(options["speculative_config"])),
        *("--worker-extension-cls", EXTENSION, "--no-async-scheduling", "--skip-tokenizer-init"),
        *("--host", "127.0.0.1"),
    ]


class BlendEngine:
    """A vLLM engine that samples from behavior policies.

    ```python
    with BlendEngine("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-4B", max_model_len=8192) as engine:
        rollout = sample(student, teacher, prompts, TrustRegionPolicy(0.01), engine=engine, max_new_tokens=512, ...)
        engine.update_student(student.named_parameters())  # after each optimizer step
    ```

    A process can hold one such engine at a time, unless each has a process of its own.

    Args:
        student: directory or hub name of the student's checkpoint; runs as the draft model.
        teacher: the same of the teacher; runs as the target.
        num_speculative_tokens: tokens drafted before the teacher reads them.
        separate_process: run the engine in a process of its own; weights then pass through a file.
        weights_follow: `student` holds a configuration only; `update_student` brings the weights before anything is
            sampled.
        options: further options of `vllm.LLM`, such as `max_model_len`, `dtype`, `tensor_parallel_size`,
            `gpu_memory_utilization`, `max_num_seqs`, `enforce_eager`. A prompt, its completion and
            twice `num_speculative_tokens` more must fit into `max_model_len`.

    Raises:
        ImportError: vLLM is missing, or of a version whose internals the plugin does not know.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        *,
        num_speculative_tokens: int = 4,
        separate_process: bool = False,
        weights_follow: bool = False,
        **options: Any,
    ) -> None:
        if num_speculative_tokens < 1:
            raise InputError(f"num_speculative_tokens must be at least 1, got {num_speculative_tokens}")
        require_supported_version()
        register()
        self._names = count()
        self._separate, self._waits_for_weights = separate_process, weights_follow
        self._found_process_group = torch.distributed.is_initialized()
        self._runner_was_set = _RUNNER in os.environ
        # Read again and again while the engine lives, so it stays set until `release`.
        os.environ.setdefault(_RUNNER, "0")
        with _environment(_SEPARATE, str(int(separate_process))), generators_kept():
            import vllm

            given = engine_options(student, teacher, num_speculative_tokens)
            if weights_follow:
                given["speculative_config"]["draft_load_config"] = {"load_format": "dummy"}
            self.llm: Any = vllm.LLM(**{**given, **options})

    def __enter__(self) -> "BlendEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def sample(
        self, prompts: Sequence[Sequence[int]], policies: Sequence[BehaviorPolicy], **options: Unpack[EngineOptions]
    ) -> Rollout:
        """One completion per prompt; arguments as in `trb.sampling.sample`, which validates them.

        Raises:
            ValueError: a prompt and its completion leave vLLM no room to draft to the end.
            RuntimeError: the engine was started with `weights_follow=True` and still waits for them.
        """
        from vllm import SamplingParams

        if self._waits_for_weights:
            raise OperationError("the student has no weights yet: call update_student before sampling")
        requests = requests_of(map(str, self._names), policies, options)
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        parameters = [SamplingParams(**sampling_parameters(request)) for request in requests]
        outputs = self._live().generate(inputs, parameters, use_tqdm=False)
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        return rollout_of(prompts, requests, completions, self._ask("trb_take_records", names_of(requests)))

    def counters(self) -> dict[str, int]:
        """How often what happened inside the engine, summed up over its life (`BlendState.counters`)."""
        return self._ask("trb_counters")

    def update_student(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the draft model new weights, in the names of the student's checkpoint; what was cached is dropped."""
        if self._separate:
            self._update_through_file(dict(weights))
        else:
            self._live().collective_rpc("trb_update_student", args=(weights,))
        if not self._live().reset_prefix_cache():
            raise OperationError(
                "vLLM kept its prefix cache, which holds the student's old keys: is a request running?"
            )
        self._waits_for_weights = False

    def _update_through_file(self, weights: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        directory = Path(tempfile.mkdtemp(prefix="trb-student-"))
        try:
            # Tied weights share memory, which the format does not allow.
            whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
            save_file(whole, directory / "student.safetensors")
            self._live().collective_rpc("trb_update_student", kwargs={"path": str(directory / "student.safetensors")})
        finally:
            shutil.rmtree(directory)

    def release(self) -> None:
        """Shut the engine down and give its memory back; may be called more than once."""
        if self.llm is None:
            return
        with process_group_kept(self._found_process_group):
            self.llm.llm_engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)
        self.llm = None
        if not self._runner_was_set:
            os.environ.pop(_RUNNER, None)
        gc.collect()

    def _live(self) -> Any:
        if self.llm is None:
            raise OperationError("this engine was released; start another BlendEngine")
        return self.llm

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What the workers answer; they all hold the same, so the first one's."""
        return self._live().collective_rpc(method, args=arguments)[0]


class ServedEngine:
    """Samples from an engine that `serve_command` started, on this machine or another.

    Args:
        url: of the server, such as `http://host:8000`.
        model: the teacher's name, as given to the server.
        connections: requests in flight at once.
        timeout_s: seconds one request may take, from its beginning to the last byte of its answer.
    """

    def __init__(self, url: str, model: str, *, connections: int = 64, timeout_s: float = REQUEST_SECONDS) -> None:
        self._url, self._model, self._connections, self._timeout = url.rstrip("/"), model, connections, timeout_s

    def sample(
        self, prompts: Sequence[Sequence[int]], policies: Sequence[BehaviorPolicy], **options: Unpack[EngineOptions]
    ) -> Rollout:
        """As `BlendEngine.sample`.

        Raises:
            RuntimeError: the server refused a request (its answer is in the message), or answered no completion.
            TimeoutError: a request took longer than `timeout_s`.
            ConnectionError: the server could not be reached.
        """
        call = uuid.uuid4().hex  # several clients may share a server
        requests = requests_of((f"{call}-{row}" for row in count()), policies, options)
        with ThreadPoolExecutor(self._connections) as pool:
            completions = list(pool.map(self._complete, prompts, requests))
        records = self._ask("trb_take_records", names_of(requests))
        for request, completion in zip(requests, completions, strict=True):
            name = request.name
            record = records.get(name) if isinstance(records, dict) else None
            if not isinstance(record, dict):
                raise OperationError(f"{self._url}: there is no record of completion {name}")
            # Where no teacher took part, nothing is known of it.
            alone = not request.policy.needs_teacher and record.get("kl_teacher") == []
            columns = [column for column in _COLUMNS if column != "kl_teacher" or not alone]
            check_numbers(record, columns, len(completion), f"{self._url}: completion {name}")
        return rollout_of(prompts, requests, completions, records)

    def counters(self) -> dict[str, int]:
        """As `BlendEngine.counters`."""
        return self._ask("trb_counters")

    def update_student(self, path: str) -> None:
        """Have the server load the student's weights from a safetensors file that it can read under this path.

        Between calls of `sample`: a completion that is under way would go on with other weights than it began with.
        """
        self._post("/collective_rpc", {"method": "trb_update_student", "kwargs": {"path": path}})
        self._post("/reset_prefix_cache", {})

    def _complete(self, prompt: Sequence[int], request: BlendRequest) -> list[int]:
        parameters = sampling_parameters(request)
        extra = parameters.pop("extra_args")
        del parameters["detokenize"]
        body = {"model": self._model, "prompt": list(prompt), "vllm_xargs": extra, "return_token_ids": True}
        answer = self._post("/v1/completions", body | parameters)
        return check_completion(
            _inside(answer, self._url, "choices", 0, "token_ids"),
            where=f"{self._url}: prompt {request.name}",
            rows=request.vocabulary.size,
            stop_ids=request.vocabulary.stop_ids,
            max_new_tokens=request.max_new_tokens,
        )

    def _ask(self, method: str, *arguments: Any) -> Any:
        answer = self._post("/collective_rpc", {"method": method, "args": list(arguments)})
        return _inside(answer, self._url, "results", 0)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = ask(self._url + path, body, seconds=self._timeout, post=True)
        if answer.status_code != 200:
            raise OperationError(f"{answer.url} answered {answer.status_code}: {answer.text:.500}")
        return answer.json()


def _inside(answer: Any, url: str, *path: str | int) -> Any:
    """What lies at `path` of an answer."""
    value = answer
    for step in path:
        try:
            value = value[step]
        except (LookupError, TypeError) as error:
            raise OperationError(f"{url} answered {answer!r:.200}, which holds no {step}") from error
    return value


def sampling_parameters(request: BlendRequest) -> dict[str, Any]:
    """vLLM's own parameters of a blended request: when it ends. The rest is in the request's text."""
    return {
        "temperature": 1.0,
        "max_tokens": request.max_new_tokens,
        **stopping_parameters(request.vocabulary),
        "detokenize": False,
        "extra_args": {REQUEST_KEY: request.to_text()},
    }


def stopping_parameters(vocabulary: SharedVocabulary) -> dict[str, Any]:
    """vLLM's parameters for completions that end with any stop id of the pair, and with nothing else.

    Left to itself, an engine goes by the generation config of the checkpoint that it was started from.
    """
    return {"ignore_eos": True, "stop_token_ids": vocabulary.stop_ids}


def shared_rows_parameters(vocabulary: SharedVocabulary, rows: int, *, served: bool) -> dict[str, Any]:
    """vLLM's parameters for a model with a head of `rows`, so that only rows which the pair shares are drawn.

    What is left out is listed and not what is allowed: padding is short, and the list travels with every request. A
    server takes no infinity, and only -100 at the least, which is no probability in float32.

    Raises:
        ValueError: a server would have to be told more than `MOST_BIASES`, of which it may not survive one request.
    """
    left_out = range(vocabulary.size, rows)
    if not left_out:
        return {}
    if served and len(left_out) > MOST_BIASES:
        raise InputError(
            f"the student's head has {len(left_out)} rows more than the pair shares, and a vLLM server leaves at most "
            f"{MOST_BIASES} out: save the student with a smaller head (resize_token_embeddings) and serve that, or set "
            'vllm_mode="colocate"'
        )
    return {"logit_bias": dict.fromkeys(left_out, -100.0 if served else -math.inf)}


def check_runner(parameters: Mapping[str, Any]) -> None:
    """Have an engine that is to be started read all of `shared_rows_parameters`; vLLM's second model runner takes
    `MOST_BIASES`, so that more are left to the first.

    Raises:
        ValueError: they are more, and the environment asks for the second.
    """
    biases = len(parameters.get("logit_bias") or ())
    if biases <= MOST_BIASES:
        return
    if os.environ.setdefault(_RUNNER, "0") != "0":
        raise InputError(
            f"the student's head has {biases} rows more than the pair shares, and vLLM's second model runner leaves at "
            f"most {MOST_BIASES} out: set {_RUNNER}=0, or give the student a smaller head (resize_token_embeddings)"
        )


def requests_of(names: Iterator[str], policies: Sequence[BehaviorPolicy], options: EngineOptions) -> list[BlendRequest]:
    """A request for each row, with the next of the names."""
    shared: dict[str, Any] = dict(options)
    rows = zip(policies, shared.pop("prompt_keys"), shared.pop("rollout_index"), strict=True)
    return [
        BlendRequest(name=next(names), policy=policy, prompt_key=key, rollout_index=index, **shared)
        for policy, key, index in rows
    ]


def names_of(requests: Sequence[BlendRequest]) -> list[str]:
    return [request.name for request in requests]


def rollout_of(
    prompts: Sequence[Sequence[int]],
    requests: Sequence[BlendRequest],
    completions: Sequence[list[int]],
    records: Mapping[str, Mapping[str, Any]],
) -> Rollout:
    """The engine's completions with the records that were kept of them, by the requests' names.

    Raises:
        RuntimeError: a completion is not the one recorded: something else than the plugin has sampled or cut it.
    """
    rows = [records[name] for name in names_of(requests)]
    for row, (completion, record) in enumerate(zip(completions, rows, strict=True)):
        if completion != record["tokens"]:
            raise OperationError(
                f"vLLM returned {completion} for prompt {row}, but {record['tokens']} was sampled: the completion "
                "cannot be trusted"
            )
    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        completions=list(completions),
        stopped=[
            completion[-1] == request.vocabulary.stop_id
            for completion, request in zip(completions, requests, strict=True)
        ],
        stats=RolloutStats(**{name: [list(record[name]) for record in rows] for name in _COLUMNS}),
    )


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
