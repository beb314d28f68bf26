"""How much memory, traffic and time a step of distillation takes, before anything is run.

Everything follows from the shapes of the two models (on the meta device, without weights), from what a step does, from
how processes share the work, and from a machine (`trb.planning.machines`). Nothing here measures, and nothing is added
for comfort: collectives are counted as if nothing hid them, ranks as if they were equally long at work, and rows as if
the longest completions came last. `docs/scaling.md` derives the formulas and compares them with runs.

Left out: pipeline and sequence parallelism, offloading, quantised weights, data loading, rewards, logging, evaluation
and checkpoints. Sizes are bytes, times seconds, of one optimizer step, on the rank that has most to do.

A round drafts `k` tokens for each row, reads them in one teacher pass and yields `y = 1 + a + ... + a^(k-1)` tokens of
it at a continuation rate `a`.
"""

from trb.planning.inputs import ENGINES, STRATEGIES, Layout, Pair, Shape, Work, step_budget
from trb.planning.machines import MACHINES, Figure, Machine, find_machine
from trb.planning.plan import Plan, make_plan, run_seconds

__all__ = [
    "ENGINES",
    "MACHINES",
    "STRATEGIES",
    "Figure",
    "Layout",
    "Machine",
    "Pair",
    "Plan",
    "Shape",
    "Work",
    "find_machine",
    "make_plan",
    "run_seconds",
    "step_budget",
]
