"""What a study found: the choice of configurations, and study.json with every estimate, interval and comparison.

Reads the run directories that `trb.studies.sweep` left, and computes the same numbers from them whenever it is asked. A
study that is not finished is judged on the seeds that every method of a setting has finished, so that all comparisons
are paired.

Left out on purpose: drawing (`trb.report`), and the statistics themselves (`trb.studies.statistics`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trb.measures import MEASURES, PASS_AT_1, PER_TOKEN, Measure, measure_of, shares_by_unit
from trb.records import EVALS, METRICS, PROBE, PROBE_FOLDER, PROVENANCE, REFERENCE_SCORES, SELECTION, TEST
from trb.safety.files import json_types
from trb.studies.scores import mean_of_suites
from trb.studies.statistics import (
    Estimate,
    area_under_curve,
    band,
    combined_interval,
    combined_p_value,
    holm,
    mean_estimate,
    paired_difference,
    steps_to_target,
)
from trb.studies.study import BASELINE, ROLES, Reference, Study, Unit
from trb.training.recording import logged_metrics, read_records

__all__ = ["assemble", "finished_seeds", "selection"]

# Of metrics.jsonl: what is averaged over the seeds of a method, step by step.
_METRICS = (
    "loss",
    "trb/reward",
    "trb/accept_rate",
    "trb/completion_length",
    "trb/kl_budget",
    "trb/kl_student",
    "trb/kl_teacher",
    "trb/sequence_kl",
    "trb/sequence_kl_bound",
    "trb/stop_rate",
    "trb/support_mass",
    "trb/teacher_entropy",
    "trb/teacher_log_prob",
    "trb/teacher_weight",
)
_DIGITS = 6

Floats = NDArray[np.float64]


def assemble(study: Study, directory: str | Path) -> dict[str, Any]:
    """study.json: every setting's methods with estimates, intervals and comparisons, and their average.

    A setting without a seed that all methods have finished has no methods yet.

    Raises OSError and ValueError for a study directory that lacks its references or holds damaged files.
    """
    directory = Path(directory)
    settings = {name: _setting(study, directory, name) for name in study.settings}
    return _rounded(
        {
            "name": study.name,
            "description": study.description,
            "rule": _rule(study, {setting["measure"] for setting in settings.values()}),
            "level": study.level,
            "seeds": {"select": study.seeds.select, "test": study.seeds.test},
            "settings": settings,
            "average": _average(settings),
            "diagnostics": _diagnostics(study, directory),
            "provenance": PROVENANCE.read(directory / PROVENANCE),
        }
    )


def selection(study: Study, directory: str | Path, setting: str) -> dict[str, list[dict[str, Any]]]:
    """Every configuration of every family with its development score, the chosen one marked.

    The score is the mean over the selection seeds of what `select_by` says; the earlier one wins a tie. Empty for a
    setting with nothing to choose.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    if not study.selects(setting):
        return table
    measure = _measure(_references(directory, setting)["student"]["dev"])
    for method, configurations in study.choices(setting).items():
        rows: list[dict[str, Any]] = []
        for index, configuration in enumerate(configurations):
            runs = [Path(directory) / Unit(setting, "select", method, index, seed).path for seed in study.seeds.select]
            curves = [_dev_curve(run, measure) for run in runs]
            ranked = [_ranked(study, steps, scores) for steps, scores in curves]
            last = [scores[-1] for _, scores in curves]
            rows.append(
                {
                    "configuration": json_types(configuration),
                    "score": math.fsum(ranked) / len(ranked),
                    measure.key: math.fsum(last) / len(last),
                    "per_seed": last,
                    "seeds": len(last),
                    "selected": False,
                }
            )
        max(rows, key=lambda row: measure.sign * row["score"])["selected"] = True  # max keeps the first of equals
        table[method] = rows
    return table


def finished_seeds(study: Study, directory: str | Path, setting: str) -> list[int]:
    """The test seeds that every method has been scored with."""
    return [
        seed
        for seed in study.seeds.test
        if all((Path(directory) / _test_run(setting, method, seed) / TEST).exists() for method in study.methods)
    ]


# ---- one setting ----


def _setting(study: Study, directory: Path, name: str) -> dict[str, Any]:
    setting, seeds = study.settings[name], finished_seeds(study, directory, name)
    references = _references(directory, name)
    measure = _measure(references["student"]["test"])
    shown: dict[str, Any] = {
        "title": setting.title or name,
        "description": setting.description,
        "measure": measure.key,
        "dev": _sets(references["student"]["dev"]),
        "test": _sets(references["student"]["test"]),
        **{role: _reference(scores["test"]) for role, scores in references.items()},
        "methods": {},
        "sweep": {},
    }
    chosen = directory / name / SELECTION
    if chosen.exists():
        shown["sweep"] = SELECTION.read(chosen)["methods"]
    if seeds:
        shown["methods"] = _methods(study, directory, name, seeds, shown["sweep"], measure)
        found = shown["methods"][BASELINE]
        shown["steps"] = max(found.get("steps_per_seed", found["curve"]["steps"]))
    return shown


def _references(directory: str | Path, setting: str) -> dict[str, Any]:
    return {role: REFERENCE_SCORES.read(Path(directory) / Reference(setting, role).path) for role in ROLES}


def _measure(scores: Mapping[str, Any]) -> Measure:
    """What a setting is measured by, by the scores of one of its models."""
    return measure_of(next(iter(scores["suites"].values())))


def _sets(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "problems": score["n_problems"]} for name, score in scores["suites"].items()]


def _reference(scores: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own score, on its one draw of every problem."""
    mean = mean_of_suites(list(scores["suites"].values()))
    kept = (measure_of(mean).key, "interval", "mean_length", "stop_rate", *PER_TOKEN)
    return {key: mean[key] for key in kept if key in mean}


def _methods(
    study: Study, directory: Path, setting: str, seeds: Sequence[int], sweep: Mapping[str, Any], measure: Measure
) -> dict[str, Any]:
    tables, strata, suites = _outcomes(study, directory, setting, seeds)
    curves = {method: _Curves.read(directory, setting, method, seeds, measure) for method in study.methods}
    # Where less is better, the target is as far above the end as it would be below it.
    target = study.target**measure.sign * curves[BASELINE].mean_of_ends
    differences = _differences(study, tables, strata)
    options: dict[str, Any] = {"resamples": study.resamples, "level": study.level}
    areas = _areas(curves, options)
    found = {}
    for method, configurations in study.choices(setting).items():
        estimate = mean_estimate(tables[method], strata_P=strata, **options)
        means = _suite_means(tables[method], strata)
        selected = next((i for i, row in enumerate(sweep.get(method, ())) if row["selected"]), 0)
        found[method] = {
            "configuration": json_types(configurations[selected]),
            "seeds": len(seeds),
            "problems": tables[method].shape[1],
            measure.key: estimate.value,
            "interval": np.clip(estimate.interval, *measure.bounds).tolist(),
            "per_seed": means.mean(axis=1).tolist(),
            "suites": dict(zip(suites, means.mean(axis=0).tolist(), strict=True)),
            "difference_to_opd": None if method == BASELINE else differences[method][BASELINE],
            "differences": differences[method],
            "curve": _band(curves[method].steps, curves[method].scores, study.level, bounds=measure.bounds),
            **areas[method],
            "steps_to_target": _to_target(curves[method].each, target, measure),
            **({} if curves[method].even else {"steps_per_seed": curves[method].ends}),
            "metrics": _metrics(directory, setting, method, seeds, study.level),
            **_described(directory, setting, method, seeds, measure),
        }
    return found


def _described(directory: Path, setting: str, method: str, seeds: Sequence[int], measure: Measure) -> dict[str, float]:
    """What else is said of models that nothing can score: means over seeds and problem sets."""
    if measure is PASS_AT_1:
        return {}
    scores = [mean_of_suites([*_test_scores(directory, setting, method, seed).values()]) for seed in seeds]
    keys = (*PER_TOKEN, "mean_length", "stop_rate")
    return {key: math.fsum(score[key] for score in scores) / len(scores) for key in keys}


def _outcomes(
    study: Study, directory: Path, setting: str, seeds: Sequence[int]
) -> tuple[dict[str, Floats], NDArray[np.intp], list[str]]:
    """Per method [seeds, problems] shares of right answers, or in the mean over tokens, distinct problems of all suites
    in a row; each problem's suite; and the suites' names."""
    scored = {m: [_test_scores(directory, setting, m, seed) for seed in seeds] for m in study.methods}
    every = [item for rows in scored.values() for suites in rows for item in suites.items()]
    # The problems are the same for all, and older versions did not say which occur several times.
    same_as = {name: suite["same_as"] for name, suite in every if suite.get("same_as")}
    tables = {
        method: np.stack([np.concatenate([_per_problem(*item, same_as) for item in row.items()]) for row in rows])
        for method, rows in scored.items()
    }
    suites = scored[BASELINE][0]
    sizes = [len(_per_problem(*item, same_as)) for item in suites.items()]
    return tables, np.repeat(np.arange(len(suites)), sizes), list(suites)


def _per_problem(name: str, suite: Mapping[str, Any], same_as: Mapping[str, Sequence[int]]) -> Floats:
    if measure_of(suite) is not PASS_AT_1:
        return np.array(suite["values"])
    rates = np.array(suite["correct"]) / (suite["n_samples"] // suite["n_problems"])
    return shares_by_unit(rates, same_as.get(name, range(len(rates))))


def _differences(
    study: Study, tables: Mapping[str, Floats], strata: NDArray[np.intp]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Every method minus every other; p-values corrected (Holm) for the comparisons that share the first method.

    Against plain distillation the family is another: all methods with it, one comparison each.
    """
    names, pairs = list(study.methods), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            estimate = paired_difference(
                tables[first], tables[second], strata_P=strata, resamples=study.resamples, level=study.level
            )
            pairs[first, second], pairs[second, first] = _shown(estimate), _negative(_shown(estimate))
    against = holm({name: pairs[name, BASELINE]["p_value"] for name in names if name != BASELINE})
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for first in names:
        row = {second: dict(pairs[first, second]) for second in names if second != first}
        adjusted = holm({second: entry["p_value"] for second, entry in row.items()})
        for second, entry in row.items():
            entry["p_value_holm"] = against[first] if second == BASELINE else adjusted[second]
        table[first] = row
    return table


def _shown(estimate: Estimate) -> dict[str, Any]:
    return {
        "estimate": estimate.value,
        "interval": list(estimate.interval),
        "standard_error": estimate.standard_error,
        "p_value": estimate.p_value,
        "effect_size": estimate.effect_size,
    }


def _negative(shown: Mapping[str, Any]) -> dict[str, Any]:
    low, high = shown["interval"]
    effect = shown["effect_size"]
    return {
        **shown,
        "estimate": -shown["estimate"],
        "interval": [-high, -low],
        "effect_size": None if effect is None else -effect,
    }


def _suite_means(table: Floats, strata: NDArray[np.intp]) -> Floats:
    """[seeds, suites]"""
    return np.stack([table[:, strata == suite].mean(axis=1) for suite in range(int(strata.max()) + 1)], axis=1)


def _to_target(each: Sequence[tuple[list[int], list[float]]], target: float, measure: Measure) -> dict[str, Any]:
    """When the development curve of each seed first crosses the target; the median counts the others as never."""
    crossed = [steps_to_target(steps, measure.sign * np.array(scores), measure.sign * target) for steps, scores in each]
    middle = median(math.inf if step is None else step for step in crossed)
    return {
        "target": target,
        "median": middle if math.isfinite(middle) else None,
        "reached": sum(step is not None for step in crossed),
        "seeds": len(crossed),
    }


@dataclass(frozen=True)
class _Curves:
    """Development scores of a method: `each` seed's steps and scores, and `scores` [seeds, K] at the `steps` [K] that
    all seeds have. Seeds whose prompts were dropped have shorter epochs than others."""

    each: list[tuple[list[int], list[float]]]
    steps: Floats
    scores: Floats

    @classmethod
    def read(cls, directory: Path, setting: str, method: str, seeds: Sequence[int], measure: Measure) -> "_Curves":
        each = [_dev_curve(directory / _test_run(setting, method, seed), measure) for seed in seeds]
        shared = set(each[0][0]).intersection(*(steps for steps, _ in each))
        scores = [[score for step, score in zip(*curve, strict=True) if step in shared] for curve in each]
        return cls(each, np.array(sorted(shared), dtype=float), np.array(scores))

    @property
    def ends(self) -> list[int]:
        """How many steps each seed took."""
        return [steps[-1] for steps, _ in self.each]

    @property
    def even(self) -> bool:
        return len(set(self.ends)) == 1

    @property
    def mean_of_ends(self) -> float:
        return float(np.mean([scores[-1] for _, scores in self.each]))


def _areas(curves: Mapping[str, _Curves], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per method the area under its curve and the difference to plain distillation's; one seed shows no spread, and one
    step has no area."""
    areas = {
        method: area_under_curve(found.steps, found.scores)[:, None]
        for method, found in curves.items()
        if min(found.scores.shape) > 1
    }
    table: dict[str, dict[str, Any]] = {}
    for method in curves:
        alone = method == BASELINE or not {method, BASELINE} <= areas.keys()
        table[method] = {
            "area": _shown(mean_estimate(areas[method], **options)) if method in areas else None,
            "area_difference_to_opd": (
                None if alone else _shown(paired_difference(areas[method], areas[BASELINE], **options))
            ),
        }
    return table


def _band(
    steps: Floats, values: Floats, level: float, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> dict[str, list[float]]:
    """A curve's mean and interval over seeds at every point, cut at what a value can be."""
    mean, low, high = (np.clip(line, *bounds).tolist() for line in band(values, level))
    return {"steps": [int(step) for step in steps], "mean": mean, "low": low, "high": high}


def _metrics(
    directory: Path, setting: str, method: str, seeds: Sequence[int], level: float
) -> dict[str, dict[str, list[float]]]:
    """Logged metrics averaged over seeds, at the steps where every seed has a number."""
    paths = [directory / _test_run(setting, method, seed) / METRICS for seed in seeds]
    if not all(path.exists() for path in paths):  # a run shorter than logging_steps has logged nothing
        return {}
    runs = [logged_metrics(path, _METRICS) for path in paths]
    found = {}
    for name in _METRICS:
        steps = sorted(set(runs[0][name]).intersection(*(run[name] for run in runs)))
        if steps:
            values = np.array([[run[name][step] for step in steps] for run in runs])
            found[name] = _band(np.array(steps), values, level)
    return found


# ---- over the settings ----


def _diagnostics(study: Study, directory: Path) -> dict[str, Any]:
    """What `trb probe --output-dir STUDY/SETTING/probe` measured, of the settings where it has been run."""
    paths = {name: directory / name / PROBE_FOLDER / PROBE for name in study.settings}
    return {name: PROBE.read(path) for name, path in paths.items() if path.exists()}


def _average(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The unweighted mean over the settings, which are independent: standard errors add in squares.

    Only once every setting has its methods, and where all are measured alike.
    """
    tables = [setting["methods"] for setting in settings.values()]
    measures = {setting["measure"] for setting in settings.values()}
    if not all(tables) or len(measures) > 1:
        return {"methods": {}}
    measure = MEASURES[measures.pop()]
    found: dict[str, dict[str, Any]] = {}
    for method in tables[0]:
        entries = [table[method] for table in tables]
        against = [entry["difference_to_opd"] for entry in entries]
        found[method] = {
            measure.key: math.fsum(entry[measure.key] for entry in entries) / len(entries),
            "interval": list(combined_interval([(entry[measure.key], entry["interval"]) for entry in entries])),
            "difference_to_opd": None if None in against else _combined_difference(against, entries),
            "best": False,
        }
    p_values = {name: entry["difference_to_opd"]["p_value"] for name, entry in found.items() if name != BASELINE}
    for name, p_value in holm(p_values).items():
        found[name]["difference_to_opd"]["p_value_holm"] = p_value
    max(found.values(), key=lambda entry: measure.sign * entry[measure.key])["best"] = True
    return {"methods": found}


def _combined_difference(parts: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seeds = [entry["seeds"] for entry in entries]
    known = [(part["estimate"], part["standard_error"], count - 1) for part, count in zip(parts, seeds, strict=True)]
    return {
        "estimate": math.fsum(part["estimate"] for part in parts) / len(parts),
        "interval": list(combined_interval([(part["estimate"], part["interval"]) for part in parts])),
        "standard_error": math.hypot(*(part["standard_error"] for part in parts)) / len(parts),
        "p_value": combined_p_value(known),
    }


# ---- files ----


def _rule(study: Study, measures: set[str]) -> str:
    found = [measure for key, measure in MEASURES.items() if key in measures]
    titles, best = (" or ".join(getattr(one, name) for one in found) for name in ("title", "superlative"))
    by = {"final": f"{titles} after the last step", "area": f"area under the {titles} curve"}[study.select_by]
    number = "its" if study.configurations == "unequal" else study.configurations
    return (
        f"Per family, of {number} configurations the one with the {best} mean {by} on the development "
        f"split over {len(study.seeds.select)} seeds; the earlier listed wins a tie. Test: after the last step."
    )


def _test_run(setting: str, method: str, seed: int) -> Path:
    return Unit(setting, "test", method, 0, seed).path


def _test_scores(directory: Path, setting: str, method: str, seed: int) -> dict[str, Any]:
    path = directory / _test_run(setting, method, seed) / TEST
    suites: dict[str, Any] = TEST.read(path)["suites"]
    return suites


def _dev_curve(run: Path, measure: Measure) -> tuple[list[int], list[float]]:
    """Steps and scores on the development split, the mean of its suites."""
    by_step: dict[int, list[float]] = {}
    for line in read_records(run / EVALS):
        by_step.setdefault(line["step"], []).append(line[measure.key])
    steps = sorted(by_step)
    return steps, [math.fsum(by_step[step]) / len(by_step[step]) for step in steps]


def _ranked(study: Study, steps: Sequence[int], scores: Sequence[float]) -> float:
    return scores[-1] if study.select_by == "final" else area_under_curve(steps, scores)


def _rounded(value: Any) -> Any:
    """Numbers to six digits after the point: more would be noise, and a file to read is smaller. What was chosen stays
    as it was chosen: a learning rate may be smaller than that."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, Mapping):
        return {key: item if key == "configuration" else _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
