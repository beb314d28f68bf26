"""`trb report`: a page of what a directory holds, and exports of it.

Left out: everything but the arguments; `trb.report` reads, draws and refuses.
"""

import argparse

from trb.safety.untrusted import printable

__all__ = ["add_report", "run_report"]


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a run, comparison, study or probe directory")
    parser.add_argument(
        "--export", metavar="OUT", help="also write figures (PNG, SVG) and tables (Markdown, CSV, LaTeX)"
    )


def run_report(arguments: argparse.Namespace, rest: list[str]) -> int:
    from trb.report import export, write_report

    print(printable(str(write_report(arguments.directory)), lines=False))
    for path in export(arguments.directory, arguments.export) if arguments.export else ():
        print(printable(str(path), lines=False))
    return 0
