"""Reports: one self-contained HTML page per run or comparison, and the same curves as figures for papers.

`write_report` needs only the files a run leaves behind (see `trb.report.reading`); it trains, evaluates and
downloads nothing. Figures are in `trb.report.figures`, apart, so that a page does not pay for matplotlib.
"""

from __future__ import annotations

import os
from pathlib import Path

from trb.report.page import render
from trb.report.reading import ReportError, read

__all__ = ["ReportError", "write_report"]


def write_report(directory: str | Path) -> Path:
    """Write report.html into a run directory or a comparison directory, and return its path.

    The page works offline and makes no request. An existing page is replaced at once, never left half
    written. Raises ReportError if the directory is neither kind, or if a file in it is malformed (naming file
    and line).
    """
    html = render(read(directory))
    path = Path(directory) / "report.html"
    unfinished = path.with_name(".report.html.part")
    # Lone surrogates are legal in JSON strings but not in UTF-8. Written as bytes so that line ends stay as they
    # are: the hashes in the page's policy cover them.
    unfinished.write_bytes(html.encode("utf-8", errors="replace"))
    os.replace(unfinished, path)
    return path
