"""Directories as runs, comparisons, studies and probes leave them, and a strict reader of the pages made from them.

The numbers are made up but plausible; what a page shows is compared with these files, never with the code that wrote
the page.
"""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from trb.report import write_report

WARMUP, STEPS = 25, 100


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_row(method: str, step: int, rng: random.Random) -> dict[str, Any]:
    """One plausible optimizer step: a linear warm-up for trb, none for opd, both learning."""
    budget = 0.05 * max(0.0, 1 - step / WARMUP) if method == "trb" else 0.0
    learned = 1 - math.exp(-step / (34 if method == "trb" else 42))
    length = 96 + 60 * learned + rng.gauss(0, 5)
    kl_student = budget * (0.78 + 0.1 * rng.random())
    return {
        "step": step,
        "loss": 0.92 * math.exp(-step / 30) + 0.11 + rng.gauss(0, 0.03),
        "learning_rate": 1e-5 * min(1.0, step / 15),
        "grad_norm": 0.8 * math.exp(-step / 40) + 0.3 + abs(rng.gauss(0, 0.06)),
        "step_time": (5.2 if budget else 3.4) + rng.gauss(0, 0.15),
        "trb/kl_budget": budget,
        "trb/teacher_weight": math.sqrt(budget / 0.35),
        "trb/kl_student": kl_student,
        "trb/kl_teacher": 0.74 * math.exp(-step / 30) + 0.1 - 0.8 * kl_student,
        "trb/teacher_log_prob": -1.6 + 0.9 * learned + 3 * budget + rng.gauss(0, 0.05),
        "trb/teacher_entropy": 0.95 - 0.3 * learned - 2.2 * budget + rng.gauss(0, 0.02),
        "trb/sequence_kl": kl_student * length,
        "trb/sequence_kl_bound": budget * length,
        "trb/completion_length": length,
        "trb/stop_rate": min(1.0, 0.55 + 0.4 * learned + rng.gauss(0, 0.02)),
        "trb/reward": min(1.0, max(0.0, 0.1 + 0.36 * learned + budget + rng.gauss(0, 0.035))),
        "trb/accept_rate": 1 - math.sqrt(budget / 2) * 0.6,
    }


def score(pass_at_1: float, half_width: float = 0.05, **extra: Any) -> dict[str, Any]:
    low, high = max(0.0, pass_at_1 - half_width), min(1.0, pass_at_1 + half_width)
    counts = {"n_problems": 200, "n_samples": 4, "mean_length": 131.25, "stop_rate": 0.9125}
    return {"name": "chains", "pass_at_1": pass_at_1, "interval": [low, high], **counts, **extra}


def rollout_rows(method: str, step: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(4):
        a, b, c = (rng.randint(2, 30) for _ in range(3))
        work = f"Start with {a}. Add {b}: {a} + {b} = {a + b}.\n"
        work += f"Then take away {c}: {a + b} - {c} = {a + b - c}.\n"
        pieces = [piece for word in work.split(" ") for piece in (word, " ")][:-1]
        tokens = [*pieces, "The answer is ", "\\boxed{", str(a + b - c), "}", ".", "<|end|>"]
        blended = method == "trb" and step < WARMUP
        weight = [max(0.0, rng.betavariate(1.3, 3) * (1 - step / WARMUP)) if blended else 0.0 for _ in tokens]
        rows.append(
            {
                "step": step,
                "prompt": f"user: Start with {a}, add {b}, then take away {c}. What is left?\nassistant:",
                "completion": "".join(tokens[:-1]),
                "tokens": tokens,
                "reward": float(rng.random() < 0.4),
                "teacher_weight": weight,
                "kl_student": [0.05 * w * rng.random() for w in weight],
                "accepted": [float(rng.random() > 0.25 * w) for w in weight],
            }
        )
    return rows


def write_run(directory: Path, method: str = "trb", *, steps: int = STEPS, final: float = 0.46) -> Path:
    """A run directory as the trainer leaves it."""
    rng = random.Random(f"{method} {steps}")
    directory.mkdir(parents=True)
    schedule = {"initial_kl_budget": 0.05 if method == "trb" else 0.0, "blend_warmup_steps": WARMUP}
    trainer = {"learning_rate": 1e-5, "max_steps": steps, "hub_token": "hf_do_not_show", "seed": 0}
    config = {"method": method, "student": "zoo:student", "teacher": "zoo:teacher", "schedule": schedule}
    (directory / "config.yaml").write_text(json.dumps(config | {"trainer": trainer}))  # JSON is YAML
    (directory / "provenance.json").write_text(json.dumps(PROVENANCE))
    every = range(1, steps + 1)
    write_jsonl(directory / "metrics.jsonl", [metrics_row(method, step, rng) for step in every])
    evals = []
    for step in range(0, steps + 1, 20):
        value = 0.125 + (final - 0.125) * (1 - math.exp(-step / 30)) / (1 - math.exp(-STEPS / 30))
        evals.append({"step": step, **score(value, 0.03 + 0.02 * value)})
    write_jsonl(directory / "evals.jsonl", evals)
    write_jsonl(
        directory / "rollouts.jsonl",
        [row for step in (1, 5, 10, 20, 40, 60, 80, 100) for row in rollout_rows(method, step, rng)],
    )
    return directory


def write_outcomes(
    directory: Path, correct: dict[str, dict[str, list[int]]], *, n: int = 1, texts: bool = True
) -> Path:
    """Results per problem of the student and of methods, of `n` samples each and by problem set, and the scores that
    they make: of a comparison, or of a run where there is one method that has no directory."""
    path = directory / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, suites in correct.items():
        start, end = directory / "evaluations" / "student", directory / name / "evaluations" / f"step-{STEPS:06d}"
        if not any((directory / other).is_dir() for other in correct):
            start, end = (directory / "evaluations" / f"step-{step:06d}" for step in (0, STEPS))
        folder = start if name == "student" else end
        folder.mkdir(parents=True, exist_ok=True)
        for suite, counts in suites.items():
            settings = {"settings": {"name": suite, "n_problems": len(counts), "n": n}}
            rows = [problem_row(place, right, n, f"{name} {suite}" * texts) for place, right in enumerate(counts)]
            write_jsonl(folder / f"{suite}.jsonl", [settings, *rows])
        means = [sum(counts) / len(counts) / n for counts in suites.values()]
        results[name] = score(sum(means) / len(means), name=next(iter(suites)) if len(suites) == 1 else "mean")
    path.write_text(json.dumps(results))
    return directory


def problem_row(place: int, right: int, n: int, by: str) -> dict[str, Any]:
    """One line of an evaluation; with the text of a completion unless it is by nobody."""
    row = {"problem": place, "prompt_hash": f"{place:016x}", "n": n, "correct": right, "lengths": [7] * n}
    texts = {"question": f"How much is {place} + 1?", "completions": [f"{by} says {place}"], "right": [right == n]}
    return row | (texts if by else {})


PROVENANCE = {
    "command": "trb compare quickstart --hub_token hf_do_not_show",
    "commit": "3f9c2ab17d5e",
    "dirty": False,
    "versions": {"trb": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
    "machine": {"cpu": "example, 2 cores", "gpu": None},
    "python": "3.12.4",
    "time": "2026-11-22T18:15:00+00:00",
}


def write_comparison(directory: Path, scores: dict[str, dict[str, Any]] | None = None) -> Path:
    """A comparison directory: one run per method, and results.json."""
    scores = scores or {"trb": score(0.46, 0.039), "opd": score(0.405, 0.038)}
    for method, result in scores.items():
        write_run(directory / method, method, final=result["pass_at_1"])
    reference = {"student": score(0.125, 0.032), "teacher": score(0.71, 0.044)}
    (directory / "results.json").write_text(json.dumps({**reference, **scores, "provenance": PROVENANCE}))
    return directory


# ---- studies and probes --------------------------------------------------------------------------------

METHODS = ("opd", "trb", "fixed", "skd", "temperature", "sft", "veto")
SUITES = ("chains-4", "chains-6")
SEEDS = 8
GAIN = {"trb": 0.02, "fixed": 0.011, "skd": 0.006, "temperature": 0.004, "sft": -0.012, "veto": -0.006, "opd": 0.0}


def band(steps: list[int], mean: list[float], half_width: float) -> dict[str, Any]:
    low, high = [value - half_width for value in mean], [value + half_width for value in mean]
    return {"steps": steps, "mean": mean, "low": low, "high": high}


def difference(estimate: float, error: float = 0.006, p_holm: float | None = None) -> dict[str, Any]:
    p_value = math.erfc(abs(estimate) / error / math.sqrt(2))
    return {
        "estimate": estimate,
        "interval": [estimate - 2 * error, estimate + 2 * error],
        "standard_error": error,
        "p_value": p_value,
        "p_value_holm": min(1.0, 3 * p_value) if p_holm is None else p_holm,
        "effect_size": estimate / error / math.sqrt(SEEDS),
    }


def study_method(name: str, base: float, rng: random.Random, methods: tuple[str, ...]) -> dict[str, Any]:
    """One entry of study.json's methods."""
    value = base + GAIN[name]
    per_seed = [value + rng.gauss(0, 0.012) for _ in range(SEEDS)]
    mean = sum(per_seed) / SEEDS
    steps = list(range(0, 101, 10))
    curve = [0.12 + (mean - 0.12) * (1 - math.exp(-step / 30)) / (1 - math.exp(-100 / 30)) for step in steps]
    logged = [metrics_row(name, step, rng) for step in range(2, 101, 2)]
    metrics = {
        key: band([row["step"] for row in logged], [row[key] for row in logged], 0.02)
        for key in ("loss", "trb/reward", "trb/teacher_entropy", "trb/teacher_log_prob", "trb/kl_budget",
                    "trb/teacher_weight", "trb/kl_student", "trb/sequence_kl", "trb/sequence_kl_bound",
                    "trb/accept_rate")
    }  # fmt: skip
    options = {"trb": {"initial_kl_budget": 0.02, "blend_warmup_steps": 50}, "skd": {"skd_teacher_top_k": 15}}
    return {
        "configuration": options.get(name, {}),
        "seeds": SEEDS,
        "problems": 1024,
        "pass_at_1": mean,
        "interval": [mean - 0.012, mean + 0.012],
        "difference_to_opd": None if name == "opd" else difference(GAIN[name]),
        "differences": {other: difference(GAIN[name] - GAIN[other]) for other in methods if other != name},
        "suites": {SUITES[0]: mean + 0.1, SUITES[1]: mean - 0.1},
        "curve": band(steps, curve, 0.015),
        "area": {"estimate": sum(curve) / len(curve), "interval": [0.3, 0.4]},
        "area_difference_to_opd": None if name == "opd" else difference(0.7 * GAIN[name], 0.004),
        "steps_to_target": {"target": 0.4, "median": 44.0 - 200 * GAIN[name], "reached": SEEDS - 1, "seeds": SEEDS},
        "metrics": metrics,
        "per_seed": per_seed,
    }


def study_record(settings: tuple[str, ...] = ("chains", "sums"), methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """study.json of a finished study."""
    rng = random.Random("study")
    found: dict[str, Any] = {}
    for place, name in enumerate(settings):
        base = 0.44 + 0.1 * place
        entries = {method: study_method(method, base, rng, methods) for method in methods}
        trials = [
            {"configuration": {"initial_kl_budget": budget}, "pass_at_1": base + shift, "seeds": 3,
             "per_seed": [base + shift - 0.01, base + shift, base + shift + 0.01], "selected": budget == 0.02}
            for budget, shift in ((0.005, 0.004), (0.02, 0.015), (0.05, 0.009))
        ]  # fmt: skip
        found[name] = {
            "title": name.capitalize(),
            "description": f"A {name} task of this test.",
            "test": [{"name": suite, "problems": 512} for suite in SUITES],
            "dev": [{"name": "chains-5", "problems": 256}],
            "steps": 100,
            "student": {"pass_at_1": 0.12, "interval": [0.1, 0.14]},
            "teacher": {"pass_at_1": 0.93, "interval": [0.91, 0.95]},
            "methods": entries,
            "sweep": {"trb": trials} if "trb" in methods else {},
        }
    average = {}
    for method in methods:
        values = [setting["methods"][method]["pass_at_1"] for setting in found.values()]
        mean = sum(values) / len(values)
        average[method] = {
            "pass_at_1": mean,
            "interval": [mean - 0.009, mean + 0.009],
            "difference_to_opd": None if method == "opd" else difference(GAIN[method], 0.0045),
            "best": method == "trb",
        }
    return {
        "name": "Example study",
        "description": "Made-up numbers in the shape of a real study.",
        "rule": "Per family, the configuration with the highest mean pass@1 on the development split.",
        "level": 0.95,
        "settings": found,
        "average": {"methods": average},
        "provenance": PROVENANCE,
        "diagnostics": {settings[0]: probe_record()},
    }


def write_study(directory: Path, record: dict[str, Any] | None = None) -> Path:
    """A study directory: study.json and, for each method of each setting, the runs of two seeds."""
    record = study_record() if record is None else record
    directory.mkdir(parents=True)
    (directory / "study.json").write_text(json.dumps(record))
    for setting, entry in record["settings"].items():
        for method in entry["methods"]:
            run = write_run(directory / setting / "test" / method / "seed-100", method, steps=20)
            steps = (0, 5, 10, 15)
            write_jsonl(run / "rollouts.jsonl", [row for s in steps for row in matched_rows(method, setting, s)])
            write_jsonl(directory / setting / "test" / method / "marker.jsonl", [])
            other = directory / setting / "test" / method / "seed-1000"
            other.mkdir()
            write_jsonl(other / "rollouts.jsonl", [{"step": 0, "prompt": "of another seed", "tokens": ["x"]}])
    return directory


def matched_rows(method: str, setting: str, step: int) -> list[dict[str, Any]]:
    """Rollouts with everything the trainer records: the same prompts for every method of a setting."""
    rng = random.Random(f"{setting} {step}")
    own = random.Random(f"{method} {setting} {step}")
    rows = []
    for index in range(3):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        tokens = [str(a), "+", str(b), "=", str(a + b + (own.random() < 0.4)), "\n", "\\boxed{", "}", "<|end|>"]
        blended = method in ("trb", "fixed") and step < 15
        weight = [round(own.random(), 3) if blended else 0.0 for _ in tokens]
        chosen = [0.5 + 0.4 * own.random() for _ in tokens]
        rows.append(
            {
                "step": step,
                "prompt": f"{a}+{b}",
                "prompt_key": f"{a * 31 + b:016x}",
                "rollout_index": index,
                "completion": "".join(tokens[:-1]),
                "tokens": tokens,
                "reward": float(tokens[4] == str(a + b)),
                "teacher_weight": weight,
                "kl_student": [0.02 * w for w in weight],
                "kl_teacher": [0.3 * (1 - w) for w in weight],
                "accepted": [float(own.random() > 0.3 * w) for w in weight],
                "student_log_prob": [math.log(p) for p in chosen],
                "teacher_log_prob": [math.log(p) - own.random() for p in chosen],
                "alternatives": [
                    {
                        law: [[token, p], ["7", 0.6 * (1 - p)], [" ", 0.4 * (1 - p)]]
                        for law, p in (("student", p), ("teacher", 0.9 * p), ("behavior", 0.95 * p))
                    }
                    for token, p in zip(tokens, chosen, strict=True)
                ],
            }
        )
    return rows


def estimate(value: float, half_width: float = 0.03) -> dict[str, Any]:
    interval = [value - half_width, value + half_width]
    return {"value": value, "interval": interval, "standard_error": half_width / 2, "problems": 64}


def probe_record() -> dict[str, Any]:
    """probe.json as `trb.studies.probe.probe` writes it."""
    lengths, budgets = (4, 8, 16), (0.0, 0.01, 0.05)
    truncations = [
        {
            "length": length,
            "policies": {
                name: {
                    "ended": 0.02 * length / 16,
                    "success": {"student": estimate(0.2 + lift / 2), "teacher": estimate(0.8 - length / 40 + lift)},
                }
                for name, lift in (("student", 0.0), ("trb", length / 100))
            },
            "relative": {"trb": {"student": estimate(1.1, 0.2), "teacher": estimate(1.05, 0.04)}},
            "difference": {"trb": {"student": estimate(0.02), "teacher": estimate(length / 100, 0.06)}},
        }
        for length in lengths
    ]
    points = [
        {
            "kl_budget": budget,
            "reward": estimate(0.12 + 2 * budget),
            "teacher_log_prob": estimate(-2.0 + 12 * budget, 0.1),
            "length": estimate(25.0, 1.0),
            "sequence_kl": estimate(18 * budget, 0.01),
            "sequence_kl_bound": estimate(25 * budget, 0.01),
            "auroc": None if budget == 0.05 else estimate(0.7),
            "accept_rate": estimate(1 - budget),
        }
        for budget in budgets
    ]
    return {
        "student": "zoo:student",
        "teacher": "zoo:teacher",
        "problems": {"chains": 64},
        "samples": 4,
        "kl_budget": 0.02,
        "level": 0.95,
        "continuation": {"reference": "student", "rollouts": {}, "truncations": truncations},
        "budgets": points,
        "replacement": [{"teacher_top_k": k, "replaced": estimate(0.3 / k, 0.01)} for k in (5, 15, 25)],
        "provenance": PROVENANCE,
    }


def write_probe(directory: Path) -> Path:
    """A probe directory: probe.json, and excerpts of several policies in one rollouts.jsonl."""
    directory.mkdir(parents=True)
    (directory / "probe.json").write_text(json.dumps(probe_record()))
    rows = [{**row, "policy": name} for name in ("student", "trb", "skd") for row in matched_rows(name, "probe", 0)]
    write_jsonl(directory / "rollouts.jsonl", rows)
    return directory


# ---- reading a page back -------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "img", "input", "hr"}
# SVG elements may close themselves; of HTML elements, only void ones may.
SELF_CLOSING = {"path", "circle"}


class Page(HTMLParser):
    """Parses a report strictly: every element closed in order, and every attribute and text kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text_of: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.text_of.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSING, f"<{tag}/> does not close in HTML"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text_of[tag][-1] += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def by_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.text_of["script"][1])

    @property
    def chart_ids(self) -> list[str]:
        return [(a["id"] or "").removeprefix("figure-") for a in self.by_class("chart")]

    def row(self, first: str) -> list[str]:
        return next(cells for cells in self.rows if cells and cells[0].strip().startswith(first))


def page_of(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


# ---- hostile content -----------------------------------------------------------------------------------

HOSTILE = [
    "</script><script>window.hacked=1;alert(1)</script>",
    "<img src=x onerror=\"window.hacked=1\">",
    "<!--<script>",
    "\u2028\u2029\u0000\u001b[31m\u202eevil\ufeff",
    "\ud800 lone surrogate",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.hacked=1",
    "]]>&lt;b&gt;&#60;",
]  # fmt: skip


def write_hostile(directory: Path) -> Path:
    """A comparison whose every text tries to become markup: names, options, provenance, prompts, tokens."""
    names = {"trb": 0.4, 'x"><img src=x onerror=window.hacked=1>': 0.3}
    for name in names:
        run = write_run(directory / name, name, steps=30)
        (run / "config.yaml").write_text(json.dumps({"method": name, HOSTILE[1]: HOSTILE[0], "list": HOSTILE}))
        row = {"step": 1, "prompt": " ".join(HOSTILE), "completion": HOSTILE[0], "reward": 1.0}
        stats = {"teacher_weight": [0.5] * len(HOSTILE), "kl_student": [0.1] * len(HOSTILE)}
        write_jsonl(run / "rollouts.jsonl", [{**row, "tokens": HOSTILE, **stats}, row])
    results = {name: score(value, name=HOSTILE[0]) for name, value in names.items()}
    provenance = {"command": HOSTILE[0], HOSTILE[1]: HOSTILE[3], "time": HOSTILE[1]}
    (directory / "results.json").write_text(json.dumps({**results, "provenance": provenance}))
    return directory
