"""Draw the SmolLM2 run from its committed JSON.

python benchmarks/smollm2_figure.py benchmarks/results/smollm2.json docs/figures/smollm2.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# (metric, title, metric of a bound drawn beside it); held-out panels are marked by the flag.
PANELS = (
    ("loss", "Reverse KL on held-out prompts (nats)", None, True),
    ("trb/teacher_log_prob", "Teacher log-probability of student tokens, held out", None, True),
    ("trb/sequence_kl", "Sequence KL; dashed: its bound T·ε (nats)", "trb/sequence_kl_bound", False),
    ("trb/teacher_weight", "Teacher weight, mean over tokens", None, False),
)


def draw(record: dict, output: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), constrained_layout=True)
    warmup = record["config"]["blend_warmup_steps"]
    for axis, (key, title, bound, held_out) in zip(axes.flat, PANELS, strict=True):
        rows = [row for row in record["held_out" if held_out else "metrics"] if key in row]
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], marker="o", markersize=3)
        bounded = [row for row in rows if bound and bound in row]
        if bounded:
            axis.plot([row["step"] for row in bounded], [row[bound] for row in bounded], "k--", linewidth=0.8)
        axis.axvspan(0, warmup, color="0.93", zorder=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step (grey: warm-up)", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, help="the JSON file written by benchmarks/collect.py")
    parser.add_argument("output", type=Path, help="the figure to write; its ending chooses the format")
    arguments = parser.parse_args()
    draw(json.loads(arguments.record.read_text(encoding="utf-8")), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
