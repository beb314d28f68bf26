"""The tables and figures of docs/performance.md, and README's rows about speed, from what was measured.

    python benchmarks/performance.py              writes the page, the rows and docs/figures/growth.svg
    python benchmarks/performance.py --check      fail if the page or a row would change

Nothing is measured: everything comes from benchmarks/results. What has not been measured there is said to be so.

Left out: whole steps (`performance_steps.py`), GPUs (`performance_gpu.py`) and growth (`performance_growth.py`).
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from pages import filled, paragraph, table
from performance_files import PAGE, README, ROOT, count, each, listed, one_origin, read, spread
from performance_gpu import GPU_TABLES, gpu_row
from performance_growth import GROWTH_TABLES, write_figure
from performance_steps import STEP_TABLES, Bar, step_bars, step_row

from trb.safety.files import write_text

LOSS_BAR, LOCKSTEP_BAR = 0.5, 1.0


def section(name: str) -> list[dict[str, Any]]:
    """The cells of a section of cpu.json."""
    cells: list[dict[str, Any]] = read("cpu")["results"][name]["cells"]
    return cells


# ---- where it comes from, and whether it is enough ----


def origins() -> str:
    """What was measured by which commit, when and on what."""
    rows = [["`cpu.json`", name, *one_origin(origin)] for name, origin in read("cpu")["provenance"].items()]
    for name in ("conditions", "growth"):
        record = read(name)
        commits: dict[tuple[str, ...], list[str]] = {}
        for commit, *rest in [one_origin(origin) for origin in record["provenance"].values()] if record else []:
            commits.setdefault(tuple(rest), []).append(commit)
        rows += [[f"`{name}.json`", "", listed(found), *rest] for rest, found in commits.items()]
    rows.append(["`hybrid.json`", "", *one_origin(read("hybrid")["provenance"])])
    rows += [[f"`{name}.json`", "", *one_origin(read(name))] for name in ("gpu", "gpu-first")]
    return table(("file", "section", "commit", "day", "processor or GPU", "threads"), rows)


def bars() -> str:
    """Every bar with the worst that was measured."""
    return table(
        ("measured", "from", "to", "worst", "bar", "goal", "verdict"),
        [bar.row() for bar in [*step_bars(), *other_bars()]],
    )


def other_bars() -> list[Bar]:
    loss = {f"{cell['tokens']:,} tokens": loss_share(cell) for cell in section("memory")}
    speed = {
        f"{pair_name(cell)}, batch {cell['batch']}, ε = {cell['kl_budget']:g}": cell["speculative_over_lockstep"][
            "median"
        ]
        for cell in section("sampling")
    }
    hybrid, setting = read("hybrid")["pairs"], read("hybrid")["setting"]
    states = {f"`{name}`": pair["blocks over lockstep"]["processor"]["median"] for name, pair in hybrid.items()}
    return [
        Bar("peak memory of the loss / TRL's", loss, LOSS_BAR),
        Bar("speculative / lockstep, tokens per second", speed, LOCKSTEP_BAR, at_least=True),
        Bar("the same for models with states, per processor second", states, setting["bar"], at_least=True),
    ]


# ---- the cost model ----


def predictions() -> str:
    rows = [
        [
            f"{cell['batch']}",
            f"{cell['block']}",
            f"{cell['student_pass_ms']:.1f}",
            f"{cell['teacher_pass_ms']:.1f}",
            f"{cell['verify_ms_per_position']:.2f}",
            f"{cell['predicted_tokens_per_round']:.2f}",
            f"{cell['measured_tokens_per_round']:.2f}",
            f"{cell['predicted_over_measured_speed']:.2f}",
        ]
        for cell in section("cost model")
    ]
    passes = ("student pass, ms", "teacher pass, ms", "deciding one position of all rows, ms")
    rounds = ("tokens per round, predicted", "measured", "predicted / measured speed")
    return table(("batch", "block", *passes, *rounds), rows)


def optimism() -> str:
    cells = section("cost model")
    largest = max(cell["batch"] for cell in cells)

    def range_of(chosen: Iterable[dict[str, Any]]) -> str:
        found = [cell["predicted_over_measured_speed"] for cell in chosen]
        return f"{min(found):.2f} to {max(found):.2f}"

    return paragraph(
        f"The prediction is {range_of(cells)} times what was measured, {range_of(each(cells, batch=largest))} at "
        f"batch {largest}: it assumes every row in flight until the end, while the last rounds have few rows and the "
        "same fixed costs (their tokens per round are counted over all rows)."
    )


# ---- sampling ----


def pair_name(cell: dict[str, Any]) -> str:
    return f"{cell['pair']}, {cell['stop']}"


def sampling() -> str:
    rows = [
        [
            pair_name(cell),
            f"{cell['batch']}",
            f"{cell['kl_budget']:g}",
            spread(cell["speculative_over_lockstep"]),
            f"{cell['block_1_over_lockstep']['median']:.2f}",
            f"{cell['speculative_over_student']['median']:.2f}",
            f"{cell['accept_rate']:.0%}",
            f"{cell['teacher_passes_per_token']:.2f}",
        ]
        for cell in section("sampling")
    ]
    speeds = ("speculative / lockstep", "block 1 / lockstep", "speculative / student alone")
    return table(("pair, lengths", "batch", "ε", *speeds, "drafts kept", "teacher passes per token"), rows)


def lengths() -> str:
    natural = [cell["mean_length"] for cell in each(section("sampling"), pair="smollm2", stop="natural")]
    limit = read("cpu")["results"]["sampling"]["max_new_tokens"]
    return paragraph(
        f"Completions of SmolLM2 end where they end, after {min(natural):.0f} to {max(natural):.0f} tokens (means of "
        f"batches), at most {limit}."
    )


def sampling_row() -> str:
    cells = section("sampling")
    speed = [cell["speculative_over_lockstep"]["median"] for cell in cells]
    passes = [cell["teacher_passes_per_token"] for cell in cells]
    budgets = [cell["kl_budget"] for cell in cells]
    return (
        f"| **Fast exact sampling** | {min(speed):.1f} to {max(speed):.1f} times the tokens per second of lockstep, "
        f"{min(passes):.2f} to {max(passes):.2f} teacher passes per token | all {len(cells)} conditions measured: "
        f"SmolLM2-135M and its copy of 8 layers in bf16, and the embedded pair, batches 1 to "
        f"{max(cell['batch'] for cell in cells)}, ε = {min(budgets):g} to {max(budgets):g}, two CPU cores; "
        "[cpu.json](benchmarks/results/cpu.json) |"
    )


# ---- models that keep states ----


def hybrid() -> str:
    rows = []
    for name, pair in read("hybrid")["pairs"].items():
        student, teacher = pair["millions of parameters"]
        speed, passes = pair["blocks over lockstep"], pair["teacher passes"]
        clocks = (spread(speed[clock], least="least", most="most") for clock in ("processor", "wall"))
        sizes = f"`{name}`, {student:.1f}M under {teacher:.1f}M"
        rows.append([sizes, *clocks, f"{pair['drafts kept']:.0%}", f"{passes['lockstep']}", f"{passes['blocks']}"])
    speeds = ("blocks / lockstep, tokens per processor second", "per second of the clock")
    return table(("pair", *speeds, "drafts kept", "teacher passes, lockstep", "blocks"), rows)


def hybrid_verdict() -> str:
    record = read("hybrid")
    bar, rounds = record["setting"]["bar"], set()
    missed: dict[str, list[str]] = {"processor": [], "wall": []}
    for name, pair in record["pairs"].items():
        for clock, names in missed.items():
            rounds.add(len(pair["seconds"]["blocks"][clock]))
            if pair["blocks over lockstep"][clock]["median"] < bar:
                names.append(f"`{name}`")
    said = [f"{'missed by ' + ', '.join(names) if names else 'met by all'}" for names in missed.values()]
    return paragraph(
        f"The bar was {bar:g} in tokens per second: in processor time {said[0]}, by the clock {said[1]}. "
        f"{count(max(rounds)).capitalize()} rounds on a busy machine resolve no more than that."
    )


# ---- the solve, and the memory of the loss ----


def solve() -> str:
    rows = [
        [
            f"{cell['vocabulary']:,}",
            f"{cell['kl_budget']:g}",
            spread(cell["solve_over_two_log_softmax"]),
            f"{cell['eager_solve_over_two_log_softmax']['median']:.1f}",
            f"{cell['solve_over_bisection_speedup']['median']:.0f}",
            f"{cell['draw_over_solve']['median']:.2f}",
            f"{cell['multinomial_over_draw']['median']:.0f}",
            f"{cell['median_passes']:.0f}",
        ]
        for cell in section("solve")
    ]
    softmaxes = ("solve / two log-softmaxes", "eager / two log-softmaxes")
    rest = ("bisection / solve", "draw / solve", "multinomial / draw", "median passes")
    return table(("V", "ε", *softmaxes, *rest), rows)


def loss_share(cell: dict[str, Any]) -> float:
    return float(cell["ours_megabytes"] / cell["trl_megabytes"])


def memory() -> str:
    rows = [
        [
            f"{cell['tokens']:,}",
            *(f"{cell[f'{who}_megabytes']:,.0f}" for who in ("ours", "trl", "logits")),
            f"{loss_share(cell):.2f}",
        ]
        for cell in section("memory")
    ]
    return table(("tokens", "trb, MB", "TRL, MB", "logits of one model, for scale, MB", "trb / TRL"), rows)


# ---- the page, and README ----

TABLES: dict[str, Callable[[], str]] = {
    "origins": origins,
    "bars": bars,
    "cost model": predictions,
    "cost model, in words": optimism,
    "sampling lengths": lengths,
    "sampling": sampling,
    "states": hybrid,
    "states, in words": hybrid_verdict,
    "solve": solve,
    "memory": memory,
    **STEP_TABLES,
    **GPU_TABLES,
    **GROWTH_TABLES,
}
ROWS: tuple[Callable[[], str], ...] = (step_row, sampling_row, gpu_row)


def with_rows(readme: str) -> str:
    """README with its rows about speed, each in the place of the one that begins as it does."""
    for row in (make() for make in ROWS):
        name = row.split("|")[1]
        start = rf"\|{re.escape(name)}\|" if name.strip() else r"\| \| [\d,]+ tokens per second;"
        readme, replaced = re.subn(rf"^{start}.*$", lambda _, row=row: row, readme, flags=re.M)
        if replaced != 1:
            raise ValueError(f"README needs one row to replace by: {row}")
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page or a row would change")
    options = parser.parse_args()
    stale = []
    for path, change in ((PAGE, partial(filled, makers=TABLES)), (README, with_rows)):
        before = path.read_text(encoding="utf-8")
        after = change(before)
        if before != after:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                write_text(path, after)
    if not options.check:
        write_figure()
    print(f"{'out of date' if options.check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
