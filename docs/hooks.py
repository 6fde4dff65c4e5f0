"""What mkdocs does not do by itself: pages of notebooks and test reports, equations as MathML.

`mkdocs.yml` names this file under `hooks`; mkdocs calls its functions while it builds.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from tests_page import page as tests_page

NOTEBOOKS = Path("notebooks")
# Links out of docs/ to a notebook, and out of notebooks/ to a page: right on the code host, where
# the two folders lie side by side. On the site notebooks/ lies within the pages.
TO_NOTEBOOK = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")
TO_PAGE = re.compile(r"\]\(\.\./docs/(\w+\.md[^)]*)\)")
ANOTHER_NOTEBOOK = re.compile(r"\]\((\w+)\.ipynb\)")
EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
MATHML = LatexToMathML()


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each notebook, with the notebook to download, and one for the tests."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / NOTEBOOKS).glob("*.ipynb")):
        page, figures = notebook(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"{NOTEBOOKS}/{path.stem}.md", content=page))
        files.append(File.generated(config, f"{NOTEBOOKS}/{path.name}", content=path.read_bytes()))
        for name, png in figures.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{name}", content=png))
    files.append(File.generated(config, "tests.md", content=tests_page(root / "out")))


def notebook(contents: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the figures in its outputs, by name."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in contents["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(TO_PAGE.sub(r"](../\1)", ANOTHER_NOTEBOOK.sub(r"](\1.md)", source)))
            if len(parts) == 1:
                parts.append(f"[Download this notebook]({stem}.ipynb)")
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}/{len(figures) + 1}.png"
                figures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Figure {len(figures)}, made by the code above]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(fenced(text.rstrip("\n"), "{ .text .output }"))
    return "\n\n".join(parts) + "\n", figures


def fenced(text: str, kind: str) -> str:
    """A block of code, within a fence longer than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{kind}\n{text}\n{fence}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to notebooks at their pages."""
    return TO_NOTEBOOK.sub(r"](notebooks/\1.md)", markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns equations from TeX into MathML, which browsers show by themselves."""

    def converted(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        display = match["tag"] == "div"
        try:
            mathml = MATHML.convert_with_local_state(tex, displaystyle=display)
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {tex}\n{error}") from error
        return f'<div class="equation">{mathml}</div>' if display else mathml

    return EQUATION.sub(converted, content)
