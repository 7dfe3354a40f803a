"""Pages: Markdown whose Python blocks run, in order, when the site is built.

A page is plain Markdown, so that it reads well anywhere. Each block of Python is a cell of one notebook; what the reader need not see,
such as a check of what the page claims, is a cell in a comment:

    <!-- check
    assert distance < 0.1
    -->

To run one page alone, and to look at its pictures:

    python docs/extensions/pages.py docs/quickstart.md --pictures runs/pictures
"""

import argparse
import base64
import re
import sys
import tempfile
import time
from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

# Blocks at the margin: three backticks and the language, or a comment that begins with `check`.
CELL = re.compile(r"^```python\n(?P<shown>.*?)^```$|^<!-- check\n(?P<hidden>.*?)^-->$", re.DOTALL | re.MULTILINE)
# What looks like the beginning or the end of a block, however it is indented, quoted or listed.
FENCE = re.compile(r"(?:[ \t>]|[-*+][ \t]|\d+[.)][ \t])*(?:`{3,}|~{3,}|:{3,})")
# All that a page may begin, at the margin. Python that is shown and not run is another library's, and marked as such.
BLOCK = re.compile(
    r"""```(?:python|bash|text|\{toctree\}|\{include\}[ ]\.\./CHANGELOG\.md)$
    |```\{eval-rst\}$(?=\n\.\.[ ]chapters?::[ ].*\n```$)
    |```\{code-block\}[ ]python$(?=\n:class:[ ]theirs$)
    |:{3,}\{(?:grid\}[ ][\d ]+|grid-item-card\}[ ][\w ]+)$""",
    re.MULTILINE | re.VERBOSE,
)
# Pictures as sharp as a phone's, in the page's own size; a warning is an error, in a page as in the tests.
SETUP = """\
import os, warnings
os.environ.setdefault("PJRT_NPROC", "16")
import matplotlib
import matplotlib_inline.backend_inline as inline
get_ipython().run_line_magic("matplotlib", "inline")
inline.set_matplotlib_formats("retina")
matplotlib.rcParams.update({"figure.dpi": 75, "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 9.5,
    "savefig.bbox": "standard"})
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
warnings.filterwarnings("ignore", module="IPython|ipykernel|jupyter_client|traitlets|asyncio|zmq")
"""

# Most of a page's time is compilation, which takes half as long without optimisation, as in the tests; a network is trained with it.
QUICK = """\
import jaxlib
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if jaxlib.version.__version_info__ < (0, 11):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_experimental_ynn_fusion_type= --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
"""


def read(text):
    """The notebook of a page. Pages without Python have no cells that run."""
    cells, end, runs = [], 0, False
    for found in CELL.finditer(text):
        if prose := text[end : found.start()].strip():
            cells.append(new_markdown_cell(prose))
        end = found.end()
        hidden = found["hidden"] is not None
        source = (found["hidden"] if hidden else found["shown"]).rstrip()
        cells.append(new_code_cell(source, metadata={"tags": ["remove-cell"]} if hidden else {}))
        runs = True
    if prose := text[end:].strip():
        cells.append(new_markdown_cell(prose))
    if runs:
        cells.insert(0, new_code_cell(SETUP if "make_step(" in text else SETUP + QUICK, metadata={"tags": ["remove-cell"]}))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    # The names of cells are drawn at random otherwise, and no page would be the same twice.
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def runs(page):
    """Whether a page has anything to run."""
    return CELL.search(Path(page).read_text()) is not None


def sources(folder):
    """Every page in a folder, without what has been built there."""
    return sorted(page for page in folder.rglob("*.md") if "_build" not in page.relative_to(folder).parts)


def complaints(text):
    """What of a page would be shown and not run, run and not shown, or is no block that a page may have."""
    wrong, ends, shown = [], [], 0
    for number, found in enumerate(re.finditer(r"^.*$", text, re.MULTILINE), 1):
        line, end = found[0], ends[-1] if ends else None
        inside, where = end in ("```", "-->"), f"line {number}, {line.strip()!r}:"
        if ends and re.match(r"```python$|<!--\s*check", line, re.IGNORECASE):
            wrong.append(f"{where} a cell in another block; close that one before, with {end}")
        elif inside and line != end and FENCE.match(line):
            wrong.append(f"{where} in another block; close that one before, with {end} at the margin")
        if line == end or (end == "-->" and end in line):
            ends.pop()
        elif not inside and (fence := FENCE.match(line)):
            if not BLOCK.match(text, found.start()):
                wrong.append(f"{where} begins none of the blocks that a page may have; write ```python at the margin, or see pages.BLOCK")
            shown += line == "```python"
            ends.append(fence[0])
        elif not inside and line.lstrip().startswith("<!--") and "-->" not in line:
            ends.append("-->")
    wrong += [f"a block is open at the end of the page; close it with {end.strip()} at the margin" for end in ends]
    cells, checks = list(CELL.finditer(text)), len(re.findall(r"<!--\s*check", text, re.IGNORECASE))
    hidden = sum(found["hidden"] is not None for found in cells)
    if checks != hidden:
        wrong.append(f"{checks} comments begin as checks, and {hidden} run; write <!-- check and --> on lines of their own, at the margin")
    if len(cells) - hidden != shown:
        wrong.append(f"{shown} blocks of Python are shown, and {len(cells) - hidden} run; write ```python and ``` at the margin")
    return wrong


def run(page, pictures):
    """Runs one page, prints what its cells print, and writes their pictures into a folder."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    if wrong := complaints(Path(page).read_text()):
        sys.exit("\n".join(f"{page}: {each}" for each in wrong))
    notebook, began = read(Path(page).read_text()), time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    except CellExecutionError as error:
        sys.exit(f"{page}: {error}")
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            html = re.search(r"data:image/gif;base64,([^\"]+)", data.get("text/html", ""))
            encoded = {"png": data.get("image/png"), "gif": html and html[1]}
            for ending, picture in encoded.items():
                if picture and pictures:
                    pictures.mkdir(parents=True, exist_ok=True)
                    (pictures / f"{Path(page).stem}_{count}.{ending}").write_bytes(base64.b64decode(picture))
                count += bool(picture)
            print(output.get("text", "") or ("" if any(encoded.values()) else data.get("text/plain", "")), end="")
    print(f"\n{page}: {count} pictures, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    for page in given.pages:
        run(page, given.pictures)
