"""Runs the notebooks from top to bottom in copies, with the parameters that stand for a small run on a CPU.

    python recipes/run_notebooks.py                       all of them, nothing is kept
    python recipes/run_notebooks.py quickstart --write    those whose name has that in it; outputs go into the files

Values are put behind the cell that is tagged ``parameters``, as papermill does, but in the same cell, so that execution
counts stay in order. With --write the outputs of that run are kept in the notebook, its own source is not changed.
Knows nbformat and nbclient. The values are in notebooks/small.json.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from default_model import cache_folder
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
SMALL = FOLDER / "small.json"
TAG = "parameters"
CELL_LIMIT_S = 3600
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|mnt|content|kaggle|Users|var)/[^\s'\"]+")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def read(path: Path) -> Any:
    """A notebook, checked against the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parameters_cell(notebook: Any) -> Any:
    """The one cell with the tag.

    Raises:
        ValueError: There is none, or more than one.
    """
    cells = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{len(cells)} cells are tagged {TAG!r}; expected one")
    return cells[0]


def set_parameters(notebook: Any, values: Mapping[str, Any]) -> None:
    """Puts values behind those of the parameters cell.

    Raises:
        ValueError: A name that the cell does not set.
    """
    cell = parameters_cell(notebook)
    names = {
        target.id
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if unknown := sorted(set(values) - names):
        raise ValueError(f"the parameters cell sets no {', '.join(unknown)}; it sets {', '.join(sorted(names))}")
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    cell.source = "\n".join([cell.source, "", *lines])


def execute(path: Path, values: Mapping[str, Any], folder: Path, limit_s: int = CELL_LIMIT_S) -> Any:
    """Runs a copy in a folder of its own, beside which it finds ``recipes`` as in the repository.

    Args:
        path: The notebook; it is not changed.
        values: For `set_parameters`.
        folder: Empty, or not there yet; what the notebook writes stays there.
        limit_s: For one cell.

    Returns:
        The notebook with the outputs of the run, its source as it was.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    notebook = read(path)
    sources = [cell.source for cell in notebook.cells]
    set_parameters(notebook, values)
    work = folder / "notebooks"
    work.mkdir(parents=True)
    (folder / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    client = NotebookClient(
        notebook, timeout=limit_s, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
        cell.metadata.pop("execution", None)
    return notebook


def clean(notebook: Any) -> None:
    """Takes out what differs between machines and says nothing: colours, the kernel's version, the home folder."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            if output.output_type == "stream":
                text = _ESCAPES.sub("", output.text).replace(str(cache_folder()), "~/.cache/hf_lema")
                output.text = text.replace(str(Path.home()) + "/", "~/")


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbours of the same stream as one: each line of a command comes by itself."""
    joined: list[Any] = []
    for output in outputs:
        is_next = output.output_type == "stream" and bool(joined) and joined[-1].get("name") == output.name
        if is_next:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def absolute_paths(notebook: Any) -> list[str]:
    """Absolute paths in sources and outputs: of a machine, or of a place where the notebook need not run."""
    texts = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text", ""))
            texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return [path for text in texts for path in _ABSOLUTE_PATH.findall(text)]


def main(argv: list[str] | None = None) -> int:
    """Runs them; returns 0 if every one came to its end."""
    parser = argparse.ArgumentParser(description="run the notebooks on small parameters")
    parser.add_argument("names", nargs="*", help="parts of file names; all notebooks by default")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    args = parser.parse_args(argv)
    small = json.loads(SMALL.read_text(encoding="utf-8"))
    os.environ.setdefault("MPLBACKEND", "agg")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if args.names and not any(name in path.stem for name in args.names):
            continue
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, small[path.stem], Path(folder) / "run")
        print(f"{path.name}: {time.perf_counter() - start_s:.0f} s", flush=True)
        if args.write:
            clean(notebook)
            if paths := absolute_paths(notebook):
                print(f"{path.name} is not written, its outputs name {', '.join(paths[:5])}", file=sys.stderr)
                return 1
            nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
