"""Check the fused kernels on a GPU, then time them, the samplers, decoding, the loss and whole training steps.

    benchmarks/gpu.sh                                         one H100-class GPU, under eight minutes
    benchmarks/gpu.sh --small                                 a GPU with less memory
    benchmarks/gpu.sh --only time_loss                        one section
    python benchmarks/gpu.py --smoke --device cpu             every section in miniature; its numbers mean nothing

Needs torch, transformers and triton, no network and no checkpoints: models have the shapes of Qwen3-1.7B and Qwen3-8B
and random weights. Their distributions lie about a nat apart, so the trust-region budget binds at every token and sets
the share of drafts that are accepted. Sections have time limits; one that is cut keeps what it has measured. A section
that this commit has finished on this kind of GPU is not measured again (`--again` does), so that an interrupted run
goes on; those of other commits stay in the file, each with its commit, until they are.
The exit status is 1 if a check failed or a section broke.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_bench import (
    FULL,
    KL_BUDGET,
    SMALL,
    SMOKE,
    Bench,
    Shapes,
    copy_bandwidth,
    models_of,
    prompts_of,
    run_section,
    with_graphs,
)
from gpu_training import check_loss, time_long_sampling, time_loss, time_training
from torch import Tensor
from transformers import StaticCache

from trb import blend
from trb.blend import triton as blend_triton
from trb.blend.laws import FLAGGED
from trb.losses import chunked_reverse_kl
from trb.models.modeling import OutputHead, completion_hidden_states
from trb.policies import BehaviorPolicy, StudentPolicy, TrustRegionPolicy
from trb.safety.files import write_text
from trb.sampling import sample
from trb.sampling.attention import attention_through_slots
from trb.sampling.cache import SlotReader
from trb.sampling.draw import inverse_cdf
from trb.studies.provenance import describe

TOTAL_LIMIT_S = 470
# KL above the budget, and the share of the budget left unused: what `tests/blend/test_blend.py` promises.
ABSOLUTE_SLACK, RELATIVE_GAP = 1e-6, 1e-3
CHECKED_BUDGETS = (0.0, 5e-4, 1e-3, 5e-3, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 50.0, math.inf)


# --- the solver ------------------------------------------------------------


def logits_pair(
    bench: Bench, rows: int, vocabulary: int, family: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits as real heads produce them, and at the edges of what float32 solves."""
    generator = torch.Generator(bench.device).manual_seed(seed)
    noise = torch.randn(2, rows, vocabulary, device=bench.device, generator=generator)
    if family == "related":
        student, teacher = 3 * noise[0], 3 * noise[0] + noise[1]
    elif family == "close":
        student, teacher = 3 * noise[0], 3 * noise[0] + 0.05 * noise[1]
    elif family == "unrelated":
        student, teacher = 5 * noise[0], 5 * noise[1]
    else:
        student, teacher = noise[0], noise[1]
        peak = torch.randint(vocabulary, (2, rows), device=bench.device, generator=generator)
        for side, logits in enumerate((student, teacher)):
            logits.scatter_add_(1, peak[side][:, None], torch.full((rows, 1), 20.0, device=bench.device))
    return student.to(dtype), teacher.to(dtype)


def check_solver(bench: Bench) -> None:
    """the fused solver against the eager one in float64, which must not exceed the budget either"""
    if not bench.fused:
        bench.numbers["skipped"] = "Triton is missing, or there is no GPU"
        bench.expect(bench.device.type != "cuda", "the fused solver is unavailable on this GPU")
        return
    budget = torch.tensor(CHECKED_BUDGETS, dtype=torch.float64, device=bench.device)
    for vocabulary in bench.shapes.vocabularies:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for family in ("related", "close", "unrelated", "peaked"):
                student, teacher = logits_pair(bench, len(budget), vocabulary, family, dtype)
                name = f"{family} V={vocabulary} {str(dtype).removeprefix('torch.')}"
                check_rows(bench, name, student, teacher, budget)
    check_flags(bench)


def check_rows(bench: Bench, name: str, student: Tensor, teacher: Tensor, budget: Tensor) -> None:
    solved = blend_triton.solve_rows(student, teacher, budget)
    exact = blend.solve(student.double(), teacher.double(), budget)
    log_student, log_teacher = (torch.log_softmax(x.double(), -1) for x in (student, teacher))
    weight = solved.teacher_weight[:, None]
    log_mu = torch.log_softmax((1 - weight) * log_student + weight * log_teacher, -1)
    kl = (log_mu.exp() * (log_mu - log_student)).sum(-1)
    kl_teacher = (log_mu.exp() * (log_mu - log_teacher)).sum(-1)
    finite = budget.isfinite()
    interior = finite & (solved.teacher_weight > 0) & (solved.teacher_weight < 1)
    assert solved.log_probs is not None
    errors = {
        "flagged": float((solved.passes == FLAGGED).sum()),
        "excess": worst((kl - budget)[finite]),
        "unused": worst(((budget - kl) / budget)[interior]),
        # Their costs, because a plateau of the path leaves the weight undetermined.
        "off_eager": worst(((solved.kl_student - exact.kl_student).abs() / budget)[interior]),
        "ends_off_eager": float(((solved.teacher_weight == 1) != (exact.teacher_weight == 1)).sum()),
        "log_probs": worst((solved.log_probs - log_mu).abs() - 2e-6 * log_mu.abs()),
        "kl_student": worst((solved.kl_student - kl).abs() / (ABSOLUTE_SLACK + RELATIVE_GAP * kl)),
        "kl_teacher": worst((solved.kl_teacher - kl_teacher).abs() / (ABSOLUTE_SLACK + RELATIVE_GAP * kl_teacher)),
    }
    bench.log(name, **errors, passes=solved.passes.double().mean().item())
    limits = {"flagged": 0.0, "excess": ABSOLUTE_SLACK, "unused": RELATIVE_GAP, "off_eager": RELATIVE_GAP}
    limits |= {"ends_off_eager": 0.0, "log_probs": 1e-5, "kl_student": 1.0, "kl_teacher": 1.0}
    for key, limit in limits.items():
        bench.expect(errors[key] <= limit, f"{name}: {key} is {errors[key]:.3g}, allowed {limit:.3g}")


def worst(values: Tensor) -> float:
    """The largest value, 0 if there are none; NaN is as bad as it gets."""
    return values.nan_to_num(nan=math.inf).max().item() if values.numel() else 0.0


def check_flags(bench: Bench) -> None:
    """Rows that float32 cannot represent are flagged, and do not disturb their neighbours."""
    vocabulary = bench.shapes.vocabularies[-1]
    student, teacher = logits_pair(bench, 6, vocabulary, "related", torch.bfloat16)
    budget = torch.full((6,), KL_BUDGET, dtype=torch.float64, device=bench.device)
    alone = blend_triton.solve_rows(student, teacher, budget)
    student[1, 5] = -math.inf  # supports that differ
    teacher[2, 7] = torch.finfo(torch.bfloat16).min  # a mask
    student[3, 9] += 200.0  # log-probabilities below what float32 exponentials reach
    budget[4] = 1e-4
    solved = blend_triton.solve_rows(student, teacher, budget)
    flagged = (solved.passes == FLAGGED).tolist()
    bench.log("flags", flagged=flagged)
    bench.expect(flagged == [False, True, True, True, True, False], f"flags are wrong: {flagged}")
    for row in (0, 5):
        bench.expect(bool(solved.teacher_weight[row] == alone.teacher_weight[row]), f"row {row} was disturbed")


@contextmanager
def eager_only() -> Iterator[None]:
    with mock.patch.object(blend_triton, "available", lambda tensor: False):
        yield


def time_solver(bench: Bench) -> None:
    """the fused solver against the memory it must move, the eager solver and two log-softmaxes"""
    vocabulary = bench.shapes.vocabularies[-1]
    bandwidth = copy_bandwidth(bench)
    bench.log("copy", gb_per_s=bandwidth / 1e9)
    for rows in bench.shapes.rows:
        student, teacher = logits_pair(bench, rows, vocabulary, "related", torch.bfloat16)
        budget = torch.full((rows,), KL_BUDGET, dtype=torch.float64, device=bench.device)
        name = f"{rows} rows, V={vocabulary}"
        with eager_only():
            eager_s = bench.seconds(blend.solve, student, teacher, budget)
        bench.log(f"eager solve, {name}", milliseconds=1e3 * eager_s)
        softmax_s = bench.seconds(two_log_softmaxes, student, teacher)
        bench.log(f"two log-softmaxes, {name}", milliseconds=1e3 * softmax_s)
        if bench.fused:
            time_fused(bench, name, student, teacher, budget, bandwidth)


def two_log_softmaxes(student: Tensor, teacher: Tensor) -> None:
    for logits in (student, teacher):
        torch.log_softmax(logits, -1, dtype=torch.float32)


def time_fused(bench: Bench, name: str, student: Tensor, teacher: Tensor, budget: Tensor, bandwidth: float) -> None:
    solved = blend_triton.solve_rows(student, teacher, budget)
    row_bytes = student.shape[1] * (student.element_size() + teacher.element_size())
    read_once, written = len(student) * row_bytes, student.numel() * 4
    moved = int(solved.passes.sum()) * row_bytes + written
    fused_s = bench.seconds(blend_triton.solve_rows, student, teacher, budget)
    bench.log(
        f"fused solve, {name}",
        milliseconds=1e3 * fused_s,
        passes=solved.passes.double().mean().item(),
        gb_moved=moved / 1e9,
        gb_per_s=moved / fused_s / 1e9,
        # Above 1, the cache served some of the sweeps.
        share_of_copy_bandwidth=moved / fused_s / bandwidth,
        ideal_milliseconds=1e3 * (read_once + written) / bandwidth,
        times_ideal=fused_s * bandwidth / (read_once + written),
    )
    scalars_s = bench.seconds(blend_triton.solve_rows, student, teacher, budget, with_log_probs=False)
    bench.log(f"fused solve without log μ, {name}", milliseconds=1e3 * scalars_s)
    for block, warps in ((1024, 8), (2048, 8), (2048, 16), (4096, 8), (4096, 16), (4096, 32), (8192, 32)):
        if bench.smoke and block > 1024:
            break
        seconds = bench.seconds(blend_triton.solve_rows, student, teacher, budget, block=block, warps=warps)
        bench.log(f"fused solve, {name}, block {block}, {warps} warps", milliseconds=1e3 * seconds)


def time_draw(bench: Bench) -> None:
    """drawing tokens by inverse CDF against torch.multinomial and the solve before it"""
    vocabulary = bench.shapes.vocabularies[-1]
    for rows in bench.shapes.rows:
        student, teacher = logits_pair(bench, rows, vocabulary, "related", torch.float32)
        weights = torch.softmax(student, -1)
        uniform = torch.rand(rows, dtype=torch.float64, device=bench.device)
        bench.log(
            f"{rows} rows, V={vocabulary}",
            inverse_cdf_ms=1e3 * bench.seconds(inverse_cdf, weights, uniform),
            multinomial_ms=1e3 * bench.seconds(torch.multinomial, weights, 1),
            solve_ms=1e3 * bench.seconds(blend.solve, student, teacher, KL_BUDGET),
        )


# --- the samplers and a step ------------------------------------------------------------


def sampler_cases(shapes: Shapes) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, keyword arguments of `sample`): every method, and the block sizes the speculative one is given."""
    yield "lockstep", {"method": "lockstep"}
    yield "speculative", {"method": "speculative"}
    for block_size in shapes.block_sizes:
        yield f"speculative, blocks of {block_size}", {"method": "speculative", "block_size": block_size}


def time_sampling(bench: Bench) -> None:
    """tokens a second of every sampler, with the student's law and with the trust region's"""
    student, teacher = models_of(bench)
    parameters = [sum(p.numel() for p in model.parameters()) / 1e9 for model in (student, teacher)]
    bench.log("parameters (billions)", student=parameters[0], teacher=parameters[1])
    policies: tuple[tuple[str, BehaviorPolicy], ...] = (
        ("trust region", TrustRegionPolicy(KL_BUDGET)),
        ("student", StudentPolicy()),
    )
    for batch in bench.shapes.batches:
        for policy_name, policy in policies:
            for name, options in sampler_cases(bench.shapes):
                if policy.needs_teacher or "block_size" not in options:
                    label = f"{policy_name}, batch {batch}, {name}"
                    if options.get("block_size") != bench.shapes.block_sizes[-1] or bench.smoke:
                        time_sampler(bench, label, batch, policy, options, graphs=False)
                    if options["method"] == "speculative":
                        time_sampler(bench, f"{label}, graphs", batch, policy, options, graphs=True)


def time_sampler(
    bench: Bench, name: str, batch: int, policy: BehaviorPolicy, options: dict[str, Any], *, graphs: bool
) -> None:
    student, teacher = models_of(bench)
    prompts, stop = prompts_of(bench, batch), bench.shapes.student["vocab_size"] - 1

    def run(new_tokens: int, seed: int) -> Any:
        return sample(
            student, teacher, prompts, policy, max_new_tokens=new_tokens, eos_token_id=stop, seed=seed, **options
        )

    with with_graphs(graphs):
        # Graphs are captured in the first calls and serve the later ones, as they do in training.
        first_s, _ = bench.once(run, bench.shapes.new_tokens if graphs else min(8, bench.shapes.new_tokens), 1)
        if graphs:
            run(bench.shapes.new_tokens, 2)
        with bench.peak_memory() as memory:
            seconds, rollout = bench.once(run, bench.shapes.new_tokens, 0)
    lengths = [len(completion) for completion in rollout.completions]
    accepted = [value for row in rollout.stats.accepted for value in row]
    costs = [value for row in rollout.stats.kl_student for value in row]
    bench.log(
        name,
        tokens_per_s=sum(lengths) / seconds,
        seconds=seconds,
        **({"first_call_seconds": first_s} if graphs else {}),
        tokens=sum(lengths),
        # A pass over the whole batch counts once, and so does a position of the longest completion.
        teacher_passes_per_token=rollout.teacher_calls / max(lengths),
        student_passes_per_token=rollout.student_calls / max(lengths),
        acceptance=statistics.fmean(accepted),
        mean_kl_student=statistics.fmean(costs),
        **memory,
    )
    if policy.needs_teacher:
        # The sampler's record is float32; 0.02 itself is off by 5e-10 there.
        bench.expect(max(costs) <= KL_BUDGET + ABSOLUTE_SLACK, f"{name}: KL {max(costs):.6g} exceeds the budget")


def time_step(bench: Bench) -> None:
    """one distillation step in parts: sampling, teacher forward, student forward, loss with backward"""
    student, teacher = models_of(bench)
    shapes = bench.shapes
    generator = torch.Generator().manual_seed(0)
    length = shapes.prompt + shapes.step_completion
    ids = torch.randint(shapes.student["vocab_size"], (shapes.step_batch, length), generator=generator).to(bench.device)
    real, completion = torch.ones_like(ids), torch.zeros_like(ids)
    completion[:, -shapes.step_completion :] = 1
    tokens = ids[completion != 0]
    rows = ids, real, completion
    heads = OutputHead.of(student), OutputHead.of(teacher)

    def step() -> dict[str, float]:
        with torch.no_grad():
            teacher_s, teacher_hidden = bench.once(completion_hidden_states, teacher, *rows)
        student_s, student_hidden = bench.once(completion_hidden_states, student, *rows)
        loss_s, (loss, _) = bench.once(
            chunked_reverse_kl, student_hidden, teacher_hidden, *heads, tokens, torch.ones_like(tokens)
        )
        backward_s, _ = bench.once(loss.backward)
        student.zero_grad(set_to_none=True)
        bench.expect(math.isfinite(loss.item()), f"the loss is {loss.item()}")
        parts = {"teacher_forward_s": teacher_s, "student_forward_s": student_s, "loss_forward_s": loss_s}
        return parts | {"backward_s": backward_s}

    student.requires_grad_(True)
    try:
        step()
        with bench.peak_memory() as memory:
            repeats = [step() for _ in range(3)]
    finally:
        student.requires_grad_(False)
    parts = {key: statistics.median(repeat[key] for repeat in repeats) for key in repeats[0]}
    tokens_trained = shapes.step_batch * shapes.step_completion
    bench.log("losses and gradients", **parts, tokens_per_s=tokens_trained / sum(parts.values()), **memory)
    options = {"method": "speculative", "block_size": "planned", "keep_teacher_hidden": True}
    time_sampler(bench, "sampling for it", shapes.step_batch, TrustRegionPolicy(KL_BUDGET), options, graphs=True)


def time_decoding(bench: Bench) -> None:
    """the student's one-token pass: on the library's caches, compiled, and in slots without and with graphs"""
    student, _ = models_of(bench)
    for batch in bench.shapes.batches:
        for graphs in (False, True):
            name = f"slots{', graphs' if graphs else ''}, batch {batch}"
            with with_graphs(graphs):
                step_s = time_slots(bench, batch)
            bench.log(name, milliseconds=1e3 * step_s, tokens_per_s=batch / step_s)
    steps, capacity = (4, 16) if bench.smoke else (40, 512)
    # Compiling for a CPU needs a C++ compiler, and says nothing about CUDA graphs.
    compiler: dict[str, Any] = {"backend": "eager"} if bench.device.type == "cpu" else {"mode": "reduce-overhead"}
    variants: list[tuple[str, Callable[..., Any], bool]] = [
        ("eager, growing cache", student.forward, False),
        ("eager, static cache", student.forward, True),
    ]
    if bench.compiled:  # about 40 s for each batch size
        compiled = torch.compile(student.forward, dynamic=False, **compiler)
        variants.append(("compiled, static cache", compiled, True))
    for name, forward, static in variants:
        for batch in bench.shapes.batches:
            label = f"{name}, batch {batch}"
            try:
                cache = StaticCache(config=student.config, max_cache_len=capacity) if static else None
                first_s, step_s = time_tokens(bench, forward, cache, batch, steps)
                bench.log(label, milliseconds=1e3 * step_s, first_step_s=first_s, tokens_per_s=batch / step_s)
            # Compilers and static caches fail in many ways on new versions; that is a finding, not a failed run.
            except Exception as error:
                bench.log(label, error=f"{type(error).__name__}: {error}"[:1000])


@torch.no_grad()
def time_slots(bench: Bench, batch: int) -> float:
    """Median seconds of one token of each row, read as the sampler reads it."""
    student, _ = models_of(bench)
    prompts = prompts_of(bench, batch)
    reader = SlotReader(student, batch)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=bench.device)
    position = torch.tensor([[len(prompt)] for prompt in prompts], device=bench.device)
    longest = max(map(len, prompts)) + 1
    with attention_through_slots(student):
        reader.admit(prompts, range(batch))
        for _ in range(3):
            reader.read(ids, position, longest)
        times = [bench.once(reader.read, ids, position, longest)[0] for _ in range(4 if bench.smoke else 40)]
    return statistics.median(times)


@torch.no_grad()
def time_tokens(bench: Bench, forward: Callable[..., Any], cache: Any, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of the first one-token pass (compilation included), and the median of the passes after three more."""
    student, _ = models_of(bench)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(batch, 1, dtype=torch.long, device=bench.device),
        "use_cache": True,
    }
    # A static cache allocates itself on first use, which must not become part of a CUDA graph.
    cache = student(**inputs, past_key_values=cache, position_ids=torch.zeros_like(inputs["input_ids"])).past_key_values
    times = []
    for position in range(1, steps + 1):
        position_ids = torch.full((batch, 1), position, device=bench.device)
        if bench.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        seconds, _ = bench.once(forward, **inputs, position_ids=position_ids, past_key_values=cache, logits_to_keep=1)
        times.append(seconds)
    return times[0], statistics.median(times[min(4, steps - 1) :])


# --- all of it ------------------------------------------------------------

# (section, most seconds): checks first, what may fail in a library's compiler last.
SECTIONS: tuple[tuple[Callable[[Bench], None], float], ...] = (
    (check_solver, 60),
    (check_loss, 45),
    (time_solver, 60),
    (time_draw, 20),
    (time_loss, 90),
    (time_sampling, 150),
    (time_step, 40),
    (time_training, 120),
    (time_long_sampling, 80),
    (time_decoding, 60),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where to run (cuda)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="smaller models and batches, for about 24 GB")
    size.add_argument("--smoke", action="store_true", help="miniature everything, to see that it runs; writes no file")
    parser.add_argument(
        "--only", nargs="+", choices=[section.__name__ for section, _ in SECTIONS], help="sections to run"
    )
    parser.add_argument("--again", action="store_true", help="measure what this commit has measured already, too")
    parser.add_argument("--compiled", action="store_true", help="time compiled decoding too; takes 90 s more")
    parser.add_argument("--output", type=Path, help="the JSON file (benchmarks/results/gpu.json; with --smoke, none)")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU found; --smoke --device cpu rehearses the run without one")
    return options


def main() -> int:
    start = time.perf_counter()
    options = arguments()
    shapes = SMOKE if options.smoke else SMALL if options.small else FULL
    bench = Bench(torch.device(options.device), shapes, options.smoke, options.compiled)
    output = options.output or (None if options.smoke else Path(__file__).parent / "results" / "gpu.json")
    record = provenance(bench, options)
    record["sections"] = {} if output is None else earlier_sections(output, record)
    print(f"{record['device']}, torch {torch.__version__}, triton {record['versions']['triton']}")
    for section, limit_s in SECTIONS:
        name = section.__name__
        if options.only is not None and name not in options.only:
            continue
        if not options.again and is_done(record, name):
            print(f"\n{name}: measured before")
            continue
        left_s = TOTAL_LIMIT_S - (time.perf_counter() - start)
        origin = {key: record[key] for key in ("commit", "dirty", "time")}
        record["sections"][name] = run_section(bench, section, min(limit_s, left_s)) | origin
        record |= {"failures": failures(record), "seconds": time.perf_counter() - start}
        if output is not None:
            write_text(output, json.dumps(record, indent=1) + "\n")
    found = failures(record)
    wrote = f", wrote {output}" if output else ""
    print(f"\n{time.perf_counter() - start:.0f} s, {len(found)} failures{wrote}")
    return 1 if found else 0


def earlier_sections(output: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The sections in the file, if they are of this device and these sizes; each with its commit."""
    if not output.exists():
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    if (earlier["device"], earlier["size"]) != (record["device"], record["size"]):
        return {}
    origin = {key: earlier[key] for key in ("commit", "dirty", "time")}
    return {name: origin | section for name, section in earlier["sections"].items()}


def is_done(record: dict[str, Any], name: str) -> bool:
    section = record["sections"].get(name)
    if section is None or section["cut"] or section["error"] or section.get("failures"):
        return False
    same = section["commit"] == record["commit"] is not None
    return same and not section["dirty"] and not record["dirty"]


def failures(record: dict[str, Any]) -> list[str]:
    return [failure for section in record["sections"].values() for failure in section.get("failures", [])]


def provenance(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    record = describe()
    record["versions"]["triton"] = getattr(blend_triton.triton, "__version__", None)
    record["versions"]["cuda"] = torch.version.cuda
    on_gpu = bench.device.type == "cuda"
    record["device"] = torch.cuda.get_device_name(bench.device) if on_gpu else str(bench.device)
    record["size"] = "smoke" if options.smoke else "small" if options.small else "full"
    record["shapes"] = {name: getattr(bench.shapes, name) for name in Shapes.__dataclass_fields__}
    return record


if __name__ == "__main__":
    raise SystemExit(main())
