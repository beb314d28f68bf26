"""Every seam of vLLM that `trb.sampling.vllm.plugin` replaces or calls, as the supported version has it.

A failure here says which internal has changed, before a sampler goes wrong in silence.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

import vllm_helpers  # noqa: F401 (imports vLLM with its warnings silenced)
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import reload
from vllm.platforms import current_platform
from vllm.utils.cpu_triton_utils import _expand_kernel_impl
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner

from trb.sampling.vllm import MOST_BIASES, shared_rows_parameters
from trb.sampling.vllm import plugin as vllm_plugin
from trb.vocab import SharedVocabulary

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from vllm_stock import expanded

vllm_plugin.register()

SEAMS: list[tuple[type, str, list[str]]] = [
    (EngineArgs, "create_speculative_config", ["self", "target_model_config", "target_parallel_config"]),
    (SpeculativeConfig, "verify_equal_vocab_size_if_draft_model", ["self"]),
    (InputProcessor, "process_inputs", ["self", "request_id", "prompt", "params", "supported_tasks"]),
    (DraftModelProposer, "_raise_if_vocab_size_mismatch", ["self"]),
    (DraftModelProposer, "_create_draft_vllm_config", ["self"]),
    (SpecDecodeBaseProposer, "_sample_draft_tokens", ["self", "hidden_states", "sampling_metadata"]),
    (GPUModelRunner, "sample_tokens", ["self", "grammar_output"]),
    (GPUModelRunner, "_sample", ["self", "logits", "spec_decode_metadata"]),
    (GPUModelRunner, "_input_fits_in_drafter", ["self", "common_attn_metadata"]),
    (GPUModelRunner, "propose_draft_token_ids", ["self", "scheduler_output", "sampled_token_ids"]),
]


def stock(owner: type, name: str) -> Callable[..., Any]:
    """vLLM's own method, under the plugin's."""
    return owner.__dict__[name].trb_original


def source(function: Callable[..., Any]) -> str:
    return " ".join(inspect.getsource(function).split())


@pytest.mark.parametrize(("owner", "name", "parameters"), SEAMS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_replaced_takes_what_it_took(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(stock(owner, name)).parameters)[: len(parameters)] == parameters


def test_registering_twice_replaces_once() -> None:
    before = {(owner, name): owner.__dict__[name] for owner, name, _ in SEAMS}
    vllm_plugin.register()
    assert {(owner, name): owner.__dict__[name] for owner, name, _ in SEAMS} == before
    assert not any(hasattr(stock(owner, name), "trb_original") for owner, name, _ in SEAMS)


def test_the_runner_on_a_cpu_inherits_every_step() -> None:
    replaced = {name for owner, name, _ in SEAMS if owner is GPUModelRunner}
    assert issubclass(CPUModelRunner, GPUModelRunner)
    assert not replaced & set(CPUModelRunner.__dict__)
    assert not {"_sample_draft_tokens", "set_inputs_first_pass", "propose"} & set(DraftModelProposer.__dict__)


def test_a_step_leaves_what_late_drafts_need() -> None:
    fields = set(ExecuteModelState._fields)
    assert {"scheduler_output", "spec_decode_metadata", "spec_decode_common_attn_metadata"} <= fields
    assert {"hidden_states", "slot_mappings"} <= fields
    assert {"draft_token_ids", "num_draft_tokens"} <= set(SpecDecodeMetadata.__dataclass_fields__)
    assert {"sampled_token_ids", "logprobs_tensors"} <= set(SamplerOutput.__dataclass_fields__)


def test_sampling_comes_before_drafting_and_drafts_are_made_in_every_step_that_fits() -> None:
    text = source(stock(GPUModelRunner, "sample_tokens"))
    order = ["self._sample(logits, spec_decode_metadata)", "self._input_fits_in_drafter(", "propose_draft_token_ids("]
    assert text.index(order[0]) < text.index(order[1])
    assert "if input_fits_in_drafter: propose_draft_token_ids(sampled_token_ids)" in text


def test_the_proposer_samples_once_for_each_drafted_position() -> None:
    text = source(SpecDecodeBaseProposer.propose)
    assert text.count("self._sample_draft_tokens(") == 3  # one drafted token; the first of several; each of the others
    assert "sample_hidden_states = last_hidden_states[token_indices_to_sample]" in text
    assert "if self.num_speculative_tokens == 1" in text
    parameters = inspect.signature(SpecDecodeBaseProposer.propose).parameters
    passed = {"num_speculative_tokens", "target_token_ids", "target_positions", "target_hidden_states"}
    passed |= {"next_token_ids", "token_indices_to_sample", "sampling_metadata", "common_attn_metadata"}
    assert passed | {"slot_mappings"} <= set(parameters)


def test_the_first_pass_says_where_it_reads() -> None:
    text = source(SpecDecodeBaseProposer.__dict__["set_inputs_first_pass"].trb_original)
    assert "return total_num_output_tokens, token_indices_to_sample, new_cad" in text
    assert "num_padding_slots_per_request=self.extra_slots_per_request" in text


def test_the_scheduler_takes_back_what_was_not_decided() -> None:
    text = source(Scheduler.update_from_output)
    assert "num_accepted = max(len(generated_token_ids) - num_sampled, 0)" in text
    assert "num_rejected = num_draft_tokens - num_accepted" in text


def test_rows_still_reading_are_marked() -> None:
    assert "self.discard_request_mask.np[:num_reqs] =" in source(GPUModelRunner._prepare_inputs)


def test_a_draft_model_is_loaded_as_the_target_is() -> None:
    """If this ever fails, `draft_load_config` may have come to count, and `_create_draft_vllm_config` can go."""
    assert "load_config" not in source(stock(DraftModelProposer, "_create_draft_vllm_config"))
    assert "load_config" not in source(DraftModelProposer._get_model)
    assert "draft_load_config" in SpeculativeConfig.__dataclass_fields__


def test_loading_into_a_model_in_use() -> None:
    assert list(inspect.signature(reload.initialize_layerwise_reload).parameters) == ["model"]
    assert callable(reload.finalize_layerwise_reload)
    assert callable(GPUModelRunner.get_draft_model)
    packing = source(UnquantizedEmbeddingMethod.process_weights_after_loading)
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=False)" in packing
    assert "layer.cpu_linear =" in source(dispatch_cpu_unquantized_gemm)


def test_shutting_down_takes_the_process_group_along() -> None:
    """If this ever fails, `process_group_kept` has become unnecessary."""
    from vllm.distributed import parallel_state

    assert "cleanup_dist_env_and_memory()" in source(EngineCore.shutdown)
    assert "torch.distributed.destroy_process_group()" in source(parallel_state.destroy_distributed_environment)


def test_the_build_for_cpus_drops_the_temperatures_of_drafts() -> None:
    """If this ever fails, the mend in benchmarks/vllm_stock.py and what docs/vllm.md says of it can go."""
    if not current_platform.is_cpu():
        pytest.skip("a build for CPUs is meant")
    before = torch.full((3,), 7.0)
    _expand_kernel_impl(before, torch.tensor([1.0, 2.0]), torch.tensor([2, 3], dtype=torch.int32), 0, 1)
    assert before.tolist() == [7.0, 7.0, 7.0]


def test_what_the_benchmark_watches_and_mends_of_vllm_s_own_speculation() -> None:
    assert [*inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters] == [
        *inspect.signature(expanded).parameters
    ]
    assert [*inspect.signature(rejection_sampler.rejection_sample).parameters][:2] == [
        "draft_token_ids",
        "num_draft_tokens",
    ]
    assert "output_token_ids = rejection_sample(" in source(rejection_sampler.RejectionSampler.forward)
    assert "expand_batch_to_tokens(" in source(rejection_sampler.apply_sampling_constraints)


def test_rows_that_are_left_out_are_so_in_this_process_and_on_a_server() -> None:
    """A server clamps biases to 100 and has them under text, as JSON does; its second runner takes so many and ends."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    pair = SharedVocabulary(4, 0, ())
    here = SamplingParams(**shared_rows_parameters(pair, 6, served=False))
    assert here.logit_bias == {4: -math.inf, 5: -math.inf}
    body = {"model": "student", "prompt": [1], **shared_rows_parameters(pair, 6, served=True)}
    asked = CompletionRequest.model_validate(json.loads(json.dumps(body, allow_nan=False)))
    assert asked.to_sampling_params(8).logit_bias == {4: -100.0, 5: -100.0}
    runner = Path(inspect.getfile(GPUModelRunner)).parent / "gpu" / "sample" / "logit_bias.py"
    assert f"MAX_NUM_LOGIT_BIAS_TOKENS = {MOST_BIASES}\n" in runner.read_text()
