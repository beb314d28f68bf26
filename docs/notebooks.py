"""MkDocs hook: each notebook of docs/tutorials is run, and becomes a page with what it printed.

A notebook is committed without outputs. It runs in an empty folder, offline; a file that its text links to, such as a
report, is taken over from there. TRB_DOCS_NOTEBOOKS=0 shows the notebooks without running them.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

CELL_TIMEOUT_S = 900
NOT_RUN = "*Built with TRB_DOCS_NOTEBOOKS=0: nothing on this page was run.*"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LINK = re.compile(r"\]\(([\w./-]+)\)")
MADE_BY_RUNNING = re.compile(r"\[([^\]]*)\]\(runs/[^)]*\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        assert file.abs_src_path is not None
        notebook = nbformat.read(file.abs_src_path, as_version=4)
        page = file.src_uri.removesuffix(".ipynb")
        files.remove(file)
        if os.environ.get("TRB_DOCS_NOTEBOOKS") == "0":
            text = MADE_BY_RUNNING.sub(r"\1", as_markdown(notebook))
            files.append(File.generated(config, f"{page}.md", content=f"{NOT_RUN}\n\n{text}"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, file.src_uri, Path(folder))
            text = as_markdown(notebook)
            for target in [target for target in LINK.findall(text) if (Path(folder) / target).is_file()]:
                content = (Path(folder) / target).read_bytes()
                files.append(File.generated(config, f"{page}/{target}", content=content))
                text = text.replace(f"]({target})", f"]({Path(page).name}/{target})")
        files.append(File.generated(config, f"{page}.md", content=text))
    return files


def execute(notebook: nbformat.NotebookNode, name: str, folder: Path) -> None:
    # The commands that were installed with this Python; and nothing of whoever builds is read or written.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A kernel says that it is a terminal, and progress would be drawn; tqdm would ask for widgets to draw it with.
    os.environ |= {"TTY_COMPATIBLE": "0", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    with tempfile.TemporaryDirectory() as settings:
        os.environ |= {"IPYTHONDIR": settings, "JUPYTER_RUNTIME_DIR": settings, "JUPYTER_CONFIG_DIR": settings}
        # Sockets in that folder, not ports that other users of the machine could reach.
        kernel = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=f"{settings}/socket", connection_file=f"{settings}/kernel.json"
        )
        where = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, kernel, timeout=CELL_TIMEOUT_S, resources=where)
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as error:
            raise PluginError(f"{name} does not run: {ESCAPES.sub('', str(error))}") from error


def as_markdown(notebook: nbformat.NotebookNode) -> str:
    """Text as it stands, code in a fence, and below it what it printed."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        shell = cell.source.startswith("%%bash\n")
        parts.append(fenced("bash" if shell else "python", cell.source.removeprefix("%%bash\n")))
        printed = ESCAPES.sub("", "".join(map(text_of, cell.outputs))).strip("\n")
        if printed:
            parts.append(fenced("text", printed))
    return "\n\n".join(parts) + "\n"


def text_of(output: nbformat.NotebookNode) -> str:
    return output.text if output.output_type == "stream" else output.data.get("text/plain", "") + "\n"


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
