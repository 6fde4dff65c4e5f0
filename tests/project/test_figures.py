"""The scripts in docs/figures draw what the pages show."""

import re
import runpy
import struct
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SCRIPTS = sorted(path for path in (DOCS / "figures").glob("*.py") if path.stem != "style")


def size(png):
    """The width and height that the header of a PNG names, in pixels."""
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_figures_are_drawn(script, tmp_path, monkeypatch):
    drawn = tmp_path / "drawn.png"
    stored = script.with_suffix(".png")
    before = stored.read_bytes()
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "--small", "--output", str(drawn)])
    rc_context = pytest.importorskip("matplotlib").rc_context  # the oldest one warns when imported
    with rc_context():
        runpy.run_path(str(script), run_name="__main__")
    assert size(drawn) == size(stored)
    assert size(drawn)[0] == 900  # 6 inches at 150 dots: legible on a phone too
    assert stored.read_bytes() == before


def test_each_figure_is_on_a_page_with_its_text_for_readers_who_cannot_see_it():
    pages = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    shown = re.findall(r"!\[([^\]]+)\]\(figures/(\w+)\.png\)", pages)
    assert sorted(name for _, name in shown) == [script.stem for script in SCRIPTS]
    assert all(len(text) > 40 for text, _ in shown)
