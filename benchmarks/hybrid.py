"""Blocks against lockstep, in tokens per second, for models that keep states and whose passes are mostly weights.

    python benchmarks/hybrid.py [--rounds N] [--kinds NAME ...]        writes benchmarks/results/hybrid.json

Random weights in the proportions of released models, cut to fit: Qwen3.5 (a delta rule, three layers in four), LFM2
(convolutions) and Jamba (selective scans), a student and a teacher of one kind each. Lockstep and blocks take turns
in one process, so that what else the machine does meets both; the ratios are medians over rounds of processor and of
wall seconds. Completions must be equal, so that a ratio of seconds is one of tokens per second.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from trb.policies import TrustRegionPolicy
from trb.safety.files import write_json
from trb.sampling import sample
from trb.studies.provenance import describe

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "results" / "hybrid.json"
VOCABULARY, ROWS, TOKENS, BUDGET, BLOCKS = 8192, 4, 32, 0.02, 6
BAR = 1.2
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
# Width, layers and width of the feed-forward layers.
SMALL, LARGE = (384, 4, 1024), (768, 12, 2688)


def qwen3_5(width: int, layers: int, inner: int) -> dict[str, Any]:
    heads = width // 64
    return {
        **{"head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        **{"linear_num_key_heads": heads, "linear_num_value_heads": heads, "tie_word_embeddings": True},
    }


def lfm2(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {"layer_types": (["conv", "conv", "full_attention"] * layers)[:layers], "block_auto_adjust_ff_dim": False}


def jamba(width: int, layers: int, inner: int) -> dict[str, Any]:
    return {"attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 1, "num_experts_per_tok": 1}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"qwen3_5_text": qwen3_5, "lfm2": lfm2, "jamba": jamba}


def model(kind: str, sizes: tuple[int, int, int], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    values = dict(zip(("hidden_size", "num_hidden_layers", "intermediate_size"), sizes, strict=True))
    config = CONFIG_MAPPING[kind](**COMMON, **values, **KINDS[kind](*sizes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def race(student: PreTrainedModel, teacher: PreTrainedModel, rounds: int) -> dict[str, Any]:
    prompts = [[1 + (7 * place + row) % 800 for place in range(12 - row)] for row in range(ROWS)]
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "eos_token_id": 0, "seed": 1}
    layouts: dict[str, dict[str, Any]] = {"lockstep": {"method": "lockstep"}, "blocks": {"block_size": BLOCKS}}
    seconds: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in layouts}
    found: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, layout in layouts.items():
            start = time.process_time(), time.perf_counter()
            found[name] = sample(student, teacher, prompts, TrustRegionPolicy(BUDGET), **options, **layout)
            if turn:  # the first turn compares ways of reading
                seconds[name]["processor"].append(time.process_time() - start[0])
                seconds[name]["wall"].append(time.perf_counter() - start[1])
    kept = found["blocks"].stats.accepted
    tokens = sum(map(len, found["blocks"].completions))
    return {
        "millions of parameters": [round(one.num_parameters() / 1e6, 1) for one in (student, teacher)],
        "same completions": found["blocks"].completions == found["lockstep"].completions,
        "tokens": tokens,
        "drafts kept": sum(map(sum, kept)) / tokens,
        "teacher passes": {name: rollout.teacher_calls for name, rollout in found.items()},
        "seconds": seconds,
        "blocks over lockstep": {clock: ratios(seconds, clock) for clock in ("processor", "wall")},
    }


def ratios(seconds: dict[str, dict[str, list[float]]], clock: str) -> dict[str, float]:
    """In tokens per second: of neighbours in time."""
    found = [slow / fast for slow, fast in zip(seconds["lockstep"][clock], seconds["blocks"][clock], strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    provenance, pairs = describe(), {}
    for name in options.kinds:
        pairs[name] = race(model(name, SMALL, 1), model(name, LARGE, 2), options.rounds)
        median = {clock: ratio["median"] for clock, ratio in pairs[name]["blocks over lockstep"].items()}
        print(f"{name:14} {median['processor']:.2f} (processor) {median['wall']:.2f} (wall)", flush=True)
    record = {"rows": ROWS, "tokens": TOKENS, "kl_budget": BUDGET, "block_size": BLOCKS, "threads": 1, "bar": BAR}
    if options.kinds == [*KINDS]:
        write_json(OUTPUT, {"provenance": provenance, "setting": record, "pairs": pairs})
    missed = [
        name
        for name, found in pairs.items()
        if not found["same completions"] or found["blocks over lockstep"]["processor"]["median"] < BAR
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
