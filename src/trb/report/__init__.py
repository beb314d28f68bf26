"""Reports: one self-contained HTML page per run, comparison, study or probe, and the same as figures and tables.

`write_report` needs only the files that these leave behind (see `trb.report.reading`, `trb.report.study` and
`trb.report.probe`); it trains, evaluates and downloads nothing. Figures are in `trb.report.figures`, apart, so that a
page does not pay for matplotlib; tables are in `trb.report.tables`; `export` writes both.
"""

from __future__ import annotations

from pathlib import Path

from trb.records import PROBE, REPORT, STUDY
from trb.report import study_page, tables
from trb.report.page import render
from trb.report.probe import read_probe
from trb.report.reading import ReportError, read
from trb.report.study import read_study
from trb.safety.files import make_folder, write_bytes

__all__ = ["ReportError", "export", "write_report"]


def write_report(directory: str | Path) -> Path:
    """Write report.html into the directory of a run, a comparison, a study or a probe, and return its path.

    The page works offline and makes no request. An existing page is replaced at once, never left half
    written. Raises ReportError if the directory is none of these, or if a file in it is malformed (naming file
    and line).
    """
    html = _page(Path(directory))
    path = Path(directory) / REPORT
    # Lone surrogates are legal in JSON strings but not in UTF-8. Line ends stay as they are: the hashes in the page's
    # policy cover them.
    write_bytes(path, html.encode("utf-8", errors="replace"))
    return path


def export(directory: str | Path, out: str | Path) -> list[Path]:
    """Write the figures of a run, comparison, study or probe to OUT/figures/ (PNG and SVG) and its tables to
    OUT/tables/ (Markdown, CSV and LaTeX); returns the paths written.

    A probe has no tables. Raises ReportError as `write_report` does, and OSError where nothing can be written.
    """
    from trb.report.figures import write_figures  # matplotlib takes a second to import

    directory, out = Path(directory), Path(out)
    make_folder(out, "choose another folder to --export to")
    paths = write_figures(directory, folder=out / "figures")
    if not (directory / PROBE).is_file() or (directory / STUDY).is_file():
        paths += tables.write_tables(directory, out / "tables")
    return paths


def _page(directory: Path) -> str:
    if (directory / STUDY).is_file():
        return study_page.render_study(read_study(directory))
    if (directory / PROBE).is_file():
        return study_page.render_probe(read_probe(directory))
    return render(read(directory))
