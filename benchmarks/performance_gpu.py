"""What docs/performance.md and README say of a GPU, from benchmarks/results/gpu.json and gpu-first.json.

Left out: the measuring (`gpu.py`), and the rest of the page (`performance.py`).
"""

from collections.abc import Callable
from typing import Any

from pages import paragraph, table
from performance_files import read


def numbers(section: str, name: str = "gpu") -> dict[str, Any]:
    found: dict[str, Any] = read(name)["sections"][section]["numbers"]
    return found


def setting() -> str:
    record = read("gpu")
    shapes = record["shapes"]
    return paragraph(
        f"One {record['device']}, commit `{record['commit'][:7]}` of {record['time'][:10]}, torch "
        f"{record['versions']['torch']}: older than everything else on this page. Random bf16 weights whose "
        f"distributions lie about a nat apart, V = {shapes['student']['vocab_size']:,}, prompts of at most "
        f"{shapes['prompt']} tokens, {shapes['new_tokens']} new tokens, one run of each row."
    )


def passes() -> str:
    now, first = numbers("time_decoding"), numbers("time_decoding", "gpu-first")
    batches = read("gpu")["shapes"]["batches"]
    compiling = [first[f"compiled, static cache, batch {batch}"]["first_step_s"] for batch in batches]
    compiled = f"compiled (first; after {min(compiling):.0f} to {max(compiling):.0f} s of compiling)"
    rows = []
    for label, found, name in (
        ("the library's growing cache, eager", now, "eager, growing cache"),
        ("the library's static cache, eager", now, "eager, static cache"),
        ("ours, eager", now, "slots"),
        ("ours, replayed", now, "slots, graphs"),
        (f"the library's static cache, {compiled}", first, "compiled, static cache"),
    ):
        rows.append([label, *(f"{found[f'{name}, batch {batch}']['milliseconds']:.1f}" for batch in batches)])
    return table(("", *(f"batch {batch}, ms" for batch in batches)), rows)


def sampling() -> str:
    rates = {name: row.get("tokens_per_s") for name, row in numbers("time_sampling").items()}
    laws = {"student": "student", "ε = 0.02": "trust region"}
    rows = []
    for batch in read("gpu")["shapes"]["batches"]:
        for label, law, blocks, said in (
            ("student", laws["student"], "", ""),
            ("ε = 0.02", laws["ε = 0.02"], ", blocks of 4", ", blocks of 4"),
            ("ε = 0.02", laws["ε = 0.02"], "", ", measured blocks"),
        ):
            start = f"{law}, batch {batch}"
            without, replayed = (rates[f"{start}, speculative{blocks}{end}"] for end in ("", ", graphs"))
            speeds = (f"{rate:,.0f}" for rate in (rates[f"{start}, lockstep"], without, replayed))
            rows.append([f"{label}, {batch}{said}", *speeds, f"{replayed / without:.1f}"])
    return table(("law, batch", "lockstep", "without graphs", "with graphs", "with / without"), rows)


def first_calls() -> str:
    found = numbers("time_sampling")
    blocks, alone = (found[f"{law}, batch 8, speculative, graphs"] for law in ("trust region", "student"))
    return paragraph(
        f"A first call costs its captures: {blocks['first_call_seconds']:.1f} s instead of {blocks['seconds']:.1f} s "
        f"at batch 8 with measured blocks, {alone['first_call_seconds']:.2f} s instead of {alone['seconds']:.2f} s "
        "for the student alone. Prompts are read eagerly, and once per call."
    )


def solve() -> str:
    now, first = numbers("time_solver"), numbers("time_solver", "gpu-first")
    shapes = read("gpu")["shapes"]
    rows = []
    for count in shapes["rows"]:
        at = f", {count} rows, V={shapes['vocabularies'][-1]}"
        fused = now[f"fused solve{at}"]
        times = (fused, first[f"fused solve{at}"], now[f"eager solve{at}"], now[f"two log-softmaxes{at}"])
        shown = (f"{found['milliseconds']:.3g}" for found in times)
        rows.append([f"{count}", *shown, f"{fused['share_of_copy_bandwidth']:.2f}"])
    times = ("fused, ms", "fused, first, ms", "eager, ms", "two log-softmaxes, ms")
    return table(("rows", *times, "share of copy bandwidth"), rows)


def draws() -> str:
    found = [cell["inverse_cdf_ms"] for cell in numbers("time_draw").values()]
    return paragraph(
        f"A token draw by inverse CDF takes {min(found):.2f} to {max(found):.2f} ms, all of it launching; within the "
        "captured pass it no longer does."
    )


def step() -> str:
    shapes, found = read("gpu")["shapes"], numbers("time_step")
    losses, drawing = found["losses and gradients"], found["sampling for it"]
    sequences = shapes["step_batch"]
    return paragraph(
        f"**A distillation step** of {sequences} sequences with {shapes['step_completion']} completion tokens: teacher "
        f"forward {losses['teacher_forward_s']:.2f} s, student forward {losses['student_forward_s']:.2f} s, loss "
        f"{losses['loss_forward_s']:.2f} s, backward {losses['backward_s']:.2f} s. Sampling {sequences} completions of "
        f"{shapes['new_tokens']} tokens for it, with planned blocks and the teacher's hidden states kept: "
        f"{drawing['seconds']:.2f} s."
    )


def limit() -> str:
    gigabytes = 2 * numbers("time_sampling")["parameters (billions)"]["student"]
    floor = 1e3 * gigabytes / numbers("time_solver")["copy"]["gb_per_s"]
    taken = numbers("time_decoding")["slots, graphs, batch 8"]["milliseconds"]
    return paragraph(
        "**Unfused models.** Every pass is transformers' eager one. On a GPU replaying it hides the launches, but a "
        f"norm still is several kernels: a pass at batch 8 takes {taken:.1f} ms where the student's {gigabytes:.1f} GB "
        f"take {floor:.1f} ms at the copy's bandwidth.",
        item=True,
    )


def gpu_row() -> str:
    """README's."""
    rates = {name: row["tokens_per_s"] for name, row in numbers("time_sampling").items() if "tokens_per_s" in row}
    device = read("gpu")["device"].split()[1]
    return (
        f"| | {rates['trust region, batch 64, speculative, blocks of 4, graphs']:,.0f} tokens per second; lockstep "
        f"{rates['trust region, batch 64, lockstep']:.0f}, the student alone "
        f"{rates['student, batch 64, speculative, graphs']:,.0f} | one {device}, shapes of Qwen3-1.7B and 8B, random "
        "weights, batch 64, blocks of 4, CUDA graphs; [gpu.json](benchmarks/results/gpu.json) |"
    )


GPU_TABLES: dict[str, Callable[[], str]] = {
    "GPU": setting,
    "GPU passes": passes,
    "GPU sampling": sampling,
    "GPU first calls": first_calls,
    "GPU solve": solve,
    "GPU draws": draws,
    "GPU step": step,
    "limit of a GPU": limit,
}
