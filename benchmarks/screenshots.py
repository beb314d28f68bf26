"""Photographs a report for the documentation: its beginning and its rollout viewer, in light and in dark.

    python benchmarks/screenshots.py runs/study docs/figures

writes report-results-light.png, report-viewer-light.png and the same in dark. The directory is that of a study, a
comparison or a run; its report.html is written first. Needs Chromium.
"""

import sys
import tempfile
from pathlib import Path

from trb.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import CHROMIUM, Tab, chromium

WIDTH, HEIGHT = 1200, 900
MOST_BYTES = 300_000


def main(directory: Path, out: Path) -> None:
    if CHROMIUM is None:
        raise SystemExit("no chromium found; install one to photograph a report")
    page = write_report(directory)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        for scheme in ("light", "dark"):
            tab = browser.open(page.resolve().as_uri(), width=WIDTH, height=HEIGHT)
            tab.emulate(dark=scheme == "dark")
            tab.evaluate("document.fonts.ready.then(() => true)")
            take(tab, out / f"report-results-{scheme}.png", "header", HEIGHT)
            if tab.evaluate("document.querySelectorAll('.tok').length"):
                tab.evaluate(PARTED)
                busiest = tab.evaluate(BUSIEST)
                tab.hover(".tok", busiest)
                take(tab, out / f"report-viewer-{scheme}.png", "#rollouts", 0)


# Choose the first pair of rollouts that part ways.
PARTED = """[...document.querySelectorAll(".rows button")].some((button) => {
  button.click();
  return document.querySelector(".fork");
})"""

# The token with the strongest tint: the one a reader would point at.
BUSIEST = """(() => {
  const tints = [...document.querySelectorAll(".tok")].map((span) => Number(span.style.getPropertyValue("--a")));
  const inside = tints.map((tint, k) => (tint < 1 ? tint : 0));
  return inside.indexOf(Math.max(...inside));
})()"""


def take(tab: Tab, path: Path, selector: str, height: float) -> None:
    """A picture from the top of an element, `height` high or as high as the element."""
    box = tab.evaluate(
        f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect();"
        " return { top: box.top + scrollY, height: box.height }; })()"
    )
    tab.screenshot(path, {"x": 0, "y": box["top"], "width": WIDTH, "height": height or box["height"] + 24})
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}; take a smaller part")
    print(path, f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
