"""MkDocs hook: the pages written outside docs/, links that leave docs/, and no page that would fetch anything.

Links are written as GitHub reads them, from the file they stand in. On the site README.md is the first page, and a file
outside docs/ that a page links to, such as a result, is copied beside the pages.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"README.md": "index.md", "SECURITY.md": "security.md"}  # of the repository -> of the site
KEYS = "keys.md"

LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
# What a browser loads by itself. Links that are followed by hand may lead anywhere.
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, KEYS, content=keys_page()))
    for file in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(FENCED.sub("", file.content_string)):
            path, uri = destination(file.src_uri, target)
            if path and uri.startswith("files/") and not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    here = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        path, uri = destination(here, link[2])
        return link[0] if path is None else link[1] + posixpath.relpath(uri, posixpath.dirname(here)) + link[3]

    parts = re.split(f"({FENCED.pattern})", markdown, flags=FENCED.flags)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    fetched = FETCHED.search(output)
    if fetched:
        raise PluginError(f"{page.file.src_uri} would be fetched from elsewhere by its reader: {fetched[0]}")
    return output


def destination(page: str, target: str) -> tuple[Path | None, str]:
    """The file of the repository that a link of a page leads to, if it leads to one, and its place on the site."""
    written_in = {uri: name for name, uri in OUTSIDE.items()}.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target))
    if "://" in target or path.startswith("..") or not (ROOT / path).is_file():
        return None, target
    if path.startswith("docs/"):
        return ROOT / path, re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return ROOT / path, OUTSIDE.get(path, f"files/{path}")


def keys_page() -> str:
    """Every key of a recipe in tables, as `trb train --help-keys` lists them."""
    from trb.studies.key_list import describe_keys

    lines = [
        "# Keys of a recipe",
        "",
        "Every key that a recipe may have and, as an option, a command line: `blend_warmup_steps: 25` is",
        "`--blend-warmup-steps 25`. In Python those of the method and of training are arguments of `TRBConfig`.",
    ]
    for group, entries in describe_keys().items():
        lines += ["", f"## {group}", "", "| key | |", "|---|---|"]
        lines += [f"| `{key}` | {cell(text)} ({cell(kind)}; {cell(default)}) |" for key, kind, default, text in entries]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)
