"""Runs notebooks and stores their outputs in them, as they are committed.

    uv run notebooks/store.py notebooks/01_adam_from_the_paper.ipynb

It stores nothing that changes from run to run by itself, such as times. Of the metadata of a cell
it keeps only what folds the code away. Figures get a palette of 256 colours, which makes them three
times smaller. It refuses a notebook that prints to stderr.
"""

import argparse
import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

# Fold a cell's code away, in Colab and in Jupyter.
FOLDING = {"cellView", "jupyter"}


def with_palette(png: str) -> str:
    """The same figure, a PNG in base64, in 256 colours."""
    figure, smaller = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    figure.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        smaller, "PNG", optimize=True
    )
    return base64.b64encode(smaller.getvalue()).decode()


def store(path: Path) -> None:
    """Runs one notebook, in its own folder."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    resources = {"metadata": {"path": path.parent}}
    options = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in FOLDING & set(cell.metadata)}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"{path} prints to stderr: {output.text}")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_palette(output.data["image/png"])
    nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs notebooks and stores their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        store(path)
