"""What a plan needs to know of a machine: sizes, peak rates, and the share of them that programs reach.

Peaks come from public data sheets. What a program reaches is measured where a file of this repository holds the
measurement, and otherwise an assumption that every plan prints as one. Left out: topologies finer than "inside a node"
and "between nodes", disks, and prices.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from trb.errors import InputError, MissingFileError, did_you_mean
from trb.safety.untrusted import read_object

__all__ = ["KINDS", "MACHINES", "Figure", "Machine", "find_machine"]

KINDS = ("data sheet", "measured", "assumed")


_WORDS = ("name", "device")


class Figure(NamedTuple):
    """A number and where it comes from."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True)
class Machine:
    """One accelerator (or one process on a CPU), its node, and what a program reaches of it.

    Attributes:
        name: as in `trb doctor --machine`.
        device: cuda or cpu.
        per_node: accelerators in a node.
        memory: bytes of one accelerator.
        reserved: bytes of it that no tensor can have: the driver's context and what the allocator cannot use.
        bandwidth: bytes a second between an accelerator and its memory, at peak.
        bandwidth_share: the share of it that a pass reaches.
        flops: operations a second of dense products in the training precision, at peak.
        flops_share: the share of it that wide passes reach.
        narrow_share: the rate of sampling passes, of few tokens, over that of wide ones.
        link: bytes a second that one accelerator sends within the node, one direction, at peak.
        network: bytes a second that one accelerator's share of the network carries to other nodes, one direction.
        link_share: the share of both that collectives reach.
        collective: seconds a collective takes however little it moves.
        layer: seconds that each layer adds to a pass however few tokens it reads, kernels replayed from a graph.
        eager_layer: the same for whole sequences, every kernel launched from Python, as the update does.
        eager_slot_layer: the same for sampling passes through the slots of a cache.
        draw: seconds to draw one drafted token of every row, however few rows.
        draw_entry: seconds that each row of such a draw adds, for one entry of the vocabulary.
        column: seconds to decide one drafted position of every row, however few rows.
        solve_entry: seconds that each row of such a position adds, for one entry of the vocabulary.
        loss_entry: seconds of the loss besides its matrix products, for one token and one entry of the vocabulary.
    """

    name: str
    device: str
    per_node: Figure
    memory: Figure
    reserved: Figure
    bandwidth: Figure
    bandwidth_share: Figure
    flops: Figure
    flops_share: Figure
    narrow_share: Figure
    link: Figure
    network: Figure
    link_share: Figure
    collective: Figure
    layer: Figure
    eager_layer: Figure
    eager_slot_layer: Figure
    draw: Figure
    draw_entry: Figure
    column: Figure
    solve_entry: Figure
    loss_entry: Figure

    def figures(self) -> dict[str, Figure]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _WORDS}

    @property
    def usable(self) -> float:
        """Bytes that tensors can have."""
        return self.memory.value - self.reserved.value

    @property
    def reached_bandwidth(self) -> float:
        return self.bandwidth.value * self.bandwidth_share.value

    @property
    def reached_flops(self) -> float:
        return self.flops.value * self.flops_share.value


_GPU_RUN = "benchmarks/results/gpu.json"
_H100_SHEET = "NVIDIA H100 SXM5 80 GB data sheet"
_A100_SHEET = "NVIDIA A100 SXM4 80 GB data sheet"

H100 = Machine(
    name="h100",
    device="cuda",
    per_node=Figure(8, "data sheet", "NVIDIA DGX H100 data sheet"),
    memory=Figure(80e9, "data sheet", _H100_SHEET),
    reserved=Figure(6e9, "assumed", "driver context, collectives' buffers and fragmentation"),
    bandwidth=Figure(3.35e12, "data sheet", _H100_SHEET),
    bandwidth_share=Figure(0.896, "measured", f"{_GPU_RUN}: a copy, time_solver"),
    flops=Figure(989.4e12, "data sheet", f"{_H100_SHEET}: bf16, dense"),
    flops_share=Figure(0.320, "measured", f"{_GPU_RUN}: forward passes and backward pass of 8 x 512 tokens, time_step"),
    narrow_share=Figure(1.0, "assumed", "sampling passes read memory; their products hide behind it"),
    link=Figure(450e9, "data sheet", f"{_H100_SHEET}: NVLink 900 GB/s, both directions together"),
    network=Figure(50e9, "data sheet", "NVIDIA DGX H100 data sheet: one 400 Gb/s adapter for each GPU"),
    link_share=Figure(0.8, "assumed", "no run on two GPUs was made"),
    collective=Figure(30e-6, "assumed", "no run on two GPUs was made"),
    layer=Figure(152e-6, "measured", f"{_GPU_RUN}: replayed one-token pass at no rows less its weights, time_decoding"),
    eager_layer=Figure(0.947e-3, "measured", f"{_GPU_RUN}: eager one-token pass, static cache, time_decoding"),
    eager_slot_layer=Figure(
        3.07e-3, "measured", f"{_GPU_RUN}: 8 rows, the student alone, less its draws, time_sampling"
    ),
    draw=Figure(0.371e-3, "measured", f"{_GPU_RUN}: inverse CDF, time_draw"),
    draw_entry=Figure(3.3e-13, "measured", f"{_GPU_RUN}: inverse CDF of 512 rows less 8 rows, time_draw"),
    column=Figure(0.502e-3, "measured", f"{_GPU_RUN}: fused solve at no rows and one draw, time_solver, time_draw"),
    solve_entry=Figure(8.59e-12, "measured", f"{_GPU_RUN}: fused solve of 512 rows less 8 rows, time_solver"),
    loss_entry=Figure(3.23e-11, "measured", f"{_GPU_RUN}: loss less its matrix products, time_step"),
)

_BY_ANALOGY = "as measured on an H100; not run on an A100"
_NOT_BANDWIDTH = (
    "bandwidth_share",
    "flops_share",
    "layer",
    "eager_layer",
    "eager_slot_layer",
    "draw",
    "draw_entry",
    "column",
)

A100 = Machine(
    name="a100",
    device="cuda",
    **H100.figures()
    | {name: Figure(getattr(H100, name).value, "assumed", _BY_ANALOGY) for name in _NOT_BANDWIDTH}
    | {
        name: Figure(getattr(H100, name).value * 3.35 / 2.039, "assumed", f"{_BY_ANALOGY}, scaled by bandwidth")
        for name in ("solve_entry", "loss_entry")
    }
    | {
        "per_node": Figure(8, "data sheet", "NVIDIA DGX A100 data sheet"),
        "memory": Figure(80e9, "data sheet", _A100_SHEET),
        "bandwidth": Figure(2.039e12, "data sheet", _A100_SHEET),
        "flops": Figure(312e12, "data sheet", f"{_A100_SHEET}: bf16, dense"),
        "link": Figure(300e9, "data sheet", f"{_A100_SHEET}: NVLink 600 GB/s, both directions together"),
        "network": Figure(25e9, "data sheet", "NVIDIA DGX A100 data sheet: one 200 Gb/s adapter for each GPU"),
    },
)

_CPU_RUN = "benchmarks/results/plan_check.json"

# One process with one thread, on two cores of a shared machine: for small models, and for checking the model itself.
CPU = Machine(
    name="cpu",
    device="cpu",
    per_node=Figure(2, "measured", f"{_CPU_RUN}: two processes on two cores"),
    memory=Figure(12600000000.0, "measured", f"{_CPU_RUN}: half of the machine's memory"),
    reserved=Figure(0.0, "assumed", "a process takes what it allocates"),
    bandwidth=Figure(11100000000.0, "measured", f"{_CPU_RUN}: reading weights in sampling passes, one thread"),
    bandwidth_share=Figure(1.0, "measured", f"{_CPU_RUN}: the rates are those reached, not peaks"),
    flops=Figure(46900000000.0, "measured", f"{_CPU_RUN}: forward and backward passes, one thread"),
    flops_share=Figure(1.0, "measured", f"{_CPU_RUN}: the rates are those reached, not peaks"),
    narrow_share=Figure(1.0, "measured", f"{_CPU_RUN}: sampling passes over forward passes, one thread"),
    link=Figure(1250000000.0, "measured", f"{_CPU_RUN}: all-reduce by gloo, one thread"),
    network=Figure(1250000000.0, "measured", f"{_CPU_RUN}: no network here: as inside the machine, one thread"),
    link_share=Figure(1.0, "measured", f"{_CPU_RUN}: the rates are those reached, not peaks"),
    collective=Figure(0.000819, "measured", f"{_CPU_RUN}: all-reduce by gloo, one thread"),
    layer=Figure(0.00105, "measured", f"{_CPU_RUN}: sampling passes, one thread"),
    eager_layer=Figure(0.00105, "measured", f"{_CPU_RUN}: sampling passes, one thread"),
    eager_slot_layer=Figure(0.00105, "measured", f"{_CPU_RUN}: sampling passes, one thread"),
    draw=Figure(0.000111, "measured", f"{_CPU_RUN}: inverse CDF, one thread"),
    draw_entry=Figure(1.94e-09, "measured", f"{_CPU_RUN}: inverse CDF, one thread"),
    column=Figure(0.000395, "measured", f"{_CPU_RUN}: solve and draw, one thread"),
    solve_entry=Figure(5.13e-09, "measured", f"{_CPU_RUN}: solve and draw, one thread"),
    loss_entry=Figure(0.0, "measured", f"{_CPU_RUN}: loss less its matrix products, one thread"),
)

MACHINES = {machine.name: machine for machine in (H100, A100, CPU)}


def find_machine(spec: str) -> Machine:
    """The machine of that name, or the one a JSON file describes.

    A file holds an object: `like`, the name of a machine whose figures it starts from, and any field of `Machine`,
    each an object with value, kind (data sheet, measured or assumed) and source.

    Raises:
        ValueError: an unknown name, field or kind, a value that is not a number above 0 (0 where a time is meant), or
            a file that leaves fields open.
        FileNotFoundError: no such file.
    """
    if spec in MACHINES:
        return MACHINES[spec]
    path = Path(spec).expanduser()
    if not path.is_file():
        if path.suffix:
            raise MissingFileError(f"no machine file at {path}")
        raise InputError(
            f"unknown machine {spec!r}; choose one of {', '.join(MACHINES)}, or name a JSON file that describes it"
            f"{did_you_mean(spec, tuple(MACHINES))}"
        )
    return _described(read_object(path), str(path))


def _described(described: dict[str, Any], source: str) -> Machine:
    names = [item.name for item in fields(Machine) if item.name not in _WORDS]
    like = described.get("like")
    if like is not None and like not in MACHINES:
        hint = did_you_mean(str(like), MACHINES)
        raise InputError(f"{source}: like is {like!r}; choose one of {', '.join(MACHINES)}{hint}")
    unknown = sorted(set(described) - {*names, *_WORDS, "like"})
    if unknown:
        raise InputError(f"{source}: unknown field {unknown[0]!r}{did_you_mean(unknown[0], tuple(names))}")
    figures = {name: _figure(name, described[name], source) for name in names if name in described}
    missing = [name for name in names if name not in figures and like is None]
    if missing:
        raise InputError(f"{source} leaves {', '.join(missing)} open: give them, or name a machine under like")
    inherited = {} if like is None else MACHINES[like].figures()
    device = described.get("device", "cuda" if like is None else MACHINES[like].device)
    if device not in ("cuda", "cpu"):
        raise InputError(f"{source}: device is {device!r}; choose cuda or cpu")
    name = str(described.get("name", Path(source).stem))
    return Machine(name=name, device=device, **(inherited | figures))


# Times may be zero (nothing is added); sizes and rates may not.
_TIMES = (
    "reserved",
    "collective",
    "layer",
    "eager_layer",
    "eager_slot_layer",
    "draw",
    "draw_entry",
    "column",
    "solve_entry",
    "loss_entry",
)


def _figure(name: str, given: Any, source: str) -> Figure:
    try:
        value, kind, origin = float(given["value"]), given["kind"], str(given["source"])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{source}: {name} must be an object with value (a number), kind and source") from error
    if kind not in KINDS:
        raise InputError(f"{source}: the kind of {name} is {kind!r}; choose one of {', '.join(KINDS)}")
    if not (0 < value < float("inf") or (value == 0 and name in _TIMES)):
        raise InputError(f"{source}: {name} is {value}; it must be a finite number above 0")
    return Figure(value, kind, origin)
