"""`trb sweep`: a study, on this machine or a cluster.

Left out: which runs a study has (`trb.studies.study`) and where they are computed (`trb.studies.workers`).
"""

import argparse
from pathlib import Path

from trb.cli.display import following, new_console, print_paths, print_plan, study_table
from trb.errors import InputError

__all__ = ["add_sweep", "run_sweep"]


def add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", required=True, metavar="STUDY", help="the name of one of ours (below), or a YAML file")
    add("--output-dir", metavar="DIR", help="default: runs/ and the study's name")
    add("--methods", nargs="+", metavar="METHOD", help="only these of its methods; others may join in a later command")
    add(
        "--seeds",
        metavar="N",
        help="only its first N test seeds, or these, its own or fresh ones: 20-27; more may join in a later command",
    )
    add("--plan", action="store_true", help="check the study, print its runs, and stop")
    add("--workers", type=int, metavar="N", help="runs at once (default: one per GPU, or as many as the cores hold)")
    add(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run as tasks of a Ray cluster: its address, auto for one that is running, nothing to start one here",
    )
    add("--gpus", type=float, default=0, metavar="N", help="with --ray: GPUs per run (default: 0)")
    add("--keep-models", action="store_true", help="keep the trained models; they are removed once scored otherwise")
    add("--quiet", action="store_true", help="no progress, only the result")
    parser.set_defaults(
        hint="Run the same command again: finished runs are kept.",
        no_overrides=" (the keys of a study are set in its file, and are no options)",
    )


def _seeds(text: str) -> int | range:
    """How many test seeds ("8"), or which ("20-27", both ends included)."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else True)):
        raise InputError(f"--seeds {text} is neither a number of seeds (8) nor a range of them (20-27)")
    if not dash:
        return int(first)
    if int(last) < int(first):
        raise InputError(f"--seeds {text} is an empty range; put the smaller seed first")
    return range(int(first), int(last) + 1)


def run_sweep(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.models.packaged import quiet_libraries
    from trb.records import STUDY
    from trb.studies.study import load_study

    if arguments.workers is not None and arguments.workers < 1:
        raise InputError(f"--workers is {arguments.workers}; give at least 1")
    quiet_libraries()
    seeds = None if arguments.seeds is None else _seeds(arguments.seeds)
    study = load_study(arguments.config).part(arguments.methods, seeds)
    if arguments.plan:
        print_plan(study)
        return 0
    from trb.studies.sweep import run_study

    directory = Path(arguments.output_dir or Path("runs") / study.name)
    with study.places.told(), following(arguments.quiet) as listener:
        results = run_study(
            study,
            directory,
            workers=arguments.workers,
            ray=arguments.ray,
            gpus=arguments.gpus,
            keep_models=arguments.keep_models,
            listener=listener,
        )
    from trb.report import write_report

    console = new_console()
    for setting in results["settings"].values():
        console.print(study_table(setting))
    print_paths(results=directory / STUDY, report=write_report(directory))
    return 0
