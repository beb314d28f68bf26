"""How a study's learning rate is chosen: plain distillation at several rates, on development problems, other seeds.

    python benchmarks/study_pilot.py studies/smollm2 --rates 3e-5 1e-4 3e-4 --workers 6 \\
        --out runs/smollm2-pilot --record benchmarks/results/smollm2-pilot.json

Runs only the method that every other is compared with, so that no method's result can guide the choice. The rule: the
rate with the highest mean final score among those that leave ten points to the teacher. Leaves the study as it is.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from trb.models.packaged import quiet_libraries
from trb.safety.files import write_json
from trb.studies import provenance
from trb.studies.recipe import make_recipe
from trb.studies.run import train
from trb.studies.study import BASELINE, Unit, load_study

ROOM = 0.1


def run(study_path: str, setting: str, rate: float, seed: int, out: str) -> dict[str, Any]:
    """One run of plain distillation: its development curve and how long it took."""
    quiet_libraries()
    unit = Unit(setting, "select", BASELINE, 0, seed)
    recipe = make_recipe(load_study(study_path).recipe_of(unit).resolved(), {"learning_rate": rate})
    directory = Path(out, setting, f"rate-{rate:g}", f"seed-{seed}")
    result = train(recipe, directory)[BASELINE]
    lines = (directory / "evals.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [{key: row[key] for key in ("step", "pass_at_1", "n_problems")} for row in map(json.loads, lines)]
    return {"learning_rate": rate, "seed": seed, "curve": curve, "train_seconds": result["train_seconds"]}


def choose(runs: list[dict[str, Any]], teacher: float) -> float | None:
    """The rate that the rule picks; None if every one ends too near the teacher."""
    final: dict[float, list[float]] = {}
    for entry in runs:
        final.setdefault(entry["learning_rate"], []).append(entry["curve"][-1]["pass_at_1"])
    allowed = {rate: fmean(scores) for rate, scores in final.items() if fmean(scores) <= teacher - ROOM}
    return max(allowed, key=allowed.__getitem__) if allowed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", help="the study, by its name or file")
    parser.add_argument("--setting", help="which of its settings (default: the first)")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="learning rates to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[900, 901], help="seeds (default: 900 901)")
    parser.add_argument("--teacher", type=float, default=1.0, help="the teacher's pass@1 (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--out", required=True, help="directory of the runs")
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    study = load_study(options.study)
    setting = options.setting or next(iter(study.settings))
    taken = {*study.seeds.select, *study.seeds.test} & set(options.seeds)
    if taken:
        parser.error(f"seed {min(taken)} belongs to the study; give others with --seeds")
    os.environ |= {"OMP_NUM_THREADS": str(study.threads), "OMP_WAIT_POLICY": "PASSIVE"}  # read by the workers' torch
    jobs = [(options.study, setting, rate, seed, options.out) for rate in options.rates for seed in options.seeds]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*jobs, strict=True)))
    chosen = choose(runs, options.teacher)
    record = {"setting": setting, "teacher": options.teacher, "room": ROOM, "chosen": chosen, "runs": runs}
    write_json(options.record, record | {"provenance": provenance.describe()})
    for entry in runs:
        scores = " ".join(f"{100 * point['pass_at_1']:.1f}" for point in entry["curve"])
        print(f"{entry['learning_rate']:g} seed {entry['seed']}: {scores}  ({entry['train_seconds']:.0f} s)")
    print(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
