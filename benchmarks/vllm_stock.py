"""vLLM's own speculative decoding: the student drafts with its probabilities, and what is sampled is the teacher.

A peer of the blended engine (`vllm_rows.py`) with the same two models, drafts and model runner. How often it keeps
a draft is a floor for ours, which holds drafts to a law between the two.

vLLM 0.32 built for CPUs samples from another law here: `utils/cpu_triton_utils.py`, `_expand_kernel_impl` has the C++
kernel write the temperature of each draft into `_ensure_int64(output)`, a copy that is then dropped, so that
`apply_sampling_constraints` divides the teacher's logits by uninitialised memory, at temperature 1 as at any other. On
a CPU that one function is mended here; a build for GPUs runs as it is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trb.sampling import Rollout
from trb.sampling.rollout import RolloutStats


class StockEngine:
    """An engine that samples from the teacher, at temperature 1, with drafts of the student.

    Args:
        paths: checkpoints of student and teacher, whose heads must have one size.
        drafted: tokens drafted before the teacher reads them.
        stop: the token that ends a completion.
        options: further ones of `vllm.LLM`.
    """

    def __init__(self, paths: tuple[str, ...], drafted: int, stop: int, **options: Any) -> None:
        # In this process, and with the model runner that blended engines have.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
        from vllm import LLM
        from vllm.platforms import current_platform

        student, teacher = paths
        speculative = {
            "model": student,
            "method": "draft_model",
            "num_speculative_tokens": drafted,
            "draft_sample_method": "probabilistic",
        }
        self.needs_mending: bool = current_platform.is_cpu()
        self._stop = stop
        self._llm = LLM(
            teacher,
            speculative_config=speculative,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            # As in a blended engine; otherwise a further block would be decided after a completion's end.
            async_scheduling=False,
            **{"enforce_eager": True, **options},
        )

    def __enter__(self) -> "StockEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, mended: bool = True) -> Rollout:
        """One completion per prompt. `stats.accepted` has one row: all decisions on drafts, in no order.

        `mended=False` leaves a build for CPUs as it is.
        """
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=max_new_tokens, stop_token_ids=[self._stop], ignore_eos=True, detokenize=False, temperature=1.0
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        kept: list[float] = []
        with temperatures_expanded() if mended and self.needs_mending else nullcontext(), watched(kept, self._stop):
            outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return Rollout(
            prompts=[list(prompt) for prompt in prompts],
            completions=[list(output.outputs[0].token_ids) for output in outputs],
            stats=RolloutStats(accepted=[kept]),
        )

    def metrics(self) -> dict[str, float]:
        """vLLM's own counters since the start. Drafts after a replaced one or a stop token count as well."""
        prefix = "vllm:spec_decode_"
        found = (metric for metric in self._llm.get_metrics() if metric.name.startswith(prefix))
        return {metric.name.removeprefix(prefix): metric.value for metric in found if hasattr(metric, "value")}


def expanded(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """`[num_tokens]`: each entry of x `[batch]` as often as its row has tokens, with one value replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


@contextmanager
def temperatures_expanded() -> Iterator[None]:
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens
    rejection_sampler.expand_batch_to_tokens = expanded
    try:
        yield
    finally:
        rejection_sampler.expand_batch_to_tokens = original


@contextmanager
def watched(kept: list[float], stop: int) -> Iterator[None]:
    """Files every decision on a draft: 1.0 where it was kept, 0.0 where it was replaced."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.rejection_sample

    def watching(draft_token_ids: Tensor, num_draft_tokens: list[int], *args: Any, **kwargs: Any) -> Tensor:
        chosen = original(draft_token_ids, num_draft_tokens, *args, **kwargs)
        for drafts, tokens in zip(draft_token_ids.split(num_draft_tokens), chosen.tolist(), strict=True):
            kept.extend(decisions(drafts.tolist(), tokens, stop))
        return chosen

    rejection_sampler.rejection_sample = watching
    try:
        yield
    finally:
        rejection_sampler.rejection_sample = original


def decisions(drafts: list[int], tokens: list[int], stop: int) -> list[float]:
    """Which drafts of a block were kept; after a replaced one or a stop token nothing is decided.

    A token that replaces a draft never equals it: it is drawn where the teacher has more mass than the student.
    """
    found: list[float] = []
    for draft, token in zip(drafts, tokens, strict=False):
        found.append(float(draft == token))
        if draft != token or token == stop:
            break
    return found
