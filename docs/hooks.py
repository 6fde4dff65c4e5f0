"""Adds to mkdocs what this site needs: pages from notebooks and reports, MathML, large figures.

`mkdocs.yml` names this file under `hooks`; mkdocs calls its functions while it builds.
"""

import ast
import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import griffe
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
# CONTRIBUTING.md lies above docs/.
INTO_DOCS = re.compile(r"\]\(docs/(\w+\.md[^)]*)\)")
INSTALL = "# Colab: installs"  # how each notebook's first cell begins
FORM = re.compile(r"^# @title (.+)$", re.MULTILINE)  # what Colab shows of a folded cell
TITLES = ("suptitle", "set_title", "title")  # of matplotlib, the most general first
# How much a page counts in the search. Recipes come first; the page of tests names everything.
RECIPES, REFERENCE = 2, 0.5
BOOSTS = {
    "recipes.md": RECIPES,
    "benchmarks.md": REFERENCE,
    "design.md": REFERENCE,
    "contributing.md": REFERENCE,
}
NOT_SEARCHED = ("tests.md",)
NODE_NAME = "e=e+s+o.id"  # in the minified search
SUMMARY = "<!-- summary -->"
# A group of public names on the page of the API, and a name.
ENTRY = re.compile(r"^(?:## (?P<group>.+)|::: (?P<name>adam_jax\.\w+))$", re.MULTILINE)
TYPE = re.compile(r'<code id="(adam_jax\.[\w.]+)">')  # that signatures link to
IMAGE = re.compile(r"<img\b[^>]*>")
SOURCE = re.compile(r'<details class="mkdocstrings-source">')
EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
MATHML = LatexToMathML()


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each notebook with its download, one for the tests, and CONTRIBUTING.md."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / NOTEBOOKS).glob("*.ipynb")):
        page, figures = notebook(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"{NOTEBOOKS}/{path.stem}.md", content=page))
        files.append(File.generated(config, f"{NOTEBOOKS}/{path.name}", content=path.read_bytes()))
        for name, png in figures.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{name}", content=png))
    files.append(File.generated(config, "tests.md", content=tests_page(root / "out")))
    contributing = INTO_DOCS.sub(r"](\1)", (root / "CONTRIBUTING.md").read_text())
    files.append(File.generated(config, "contributing.md", content=contributing))


def notebook(contents: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and the figures in its outputs by name."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in contents["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(TO_PAGE.sub(r"](../\1)", ANOTHER_NOTEBOOK.sub(r"](\1.md)", source)))
            if len(parts) == 1:
                parts.append(f"[Download this notebook]({stem}.ipynb)")
            continue
        outputs: list[str] = []
        form = match[1] if (match := FORM.search(source)) else ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}/{len(figures) + 1}.png"
                figures[name] = base64.b64decode("".join(data["image/png"]))
                text = title(source) or form or f"Figure {len(figures)}"
                outputs.append(f"![{text}]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                outputs.append(fenced(text.rstrip("\n"), "{ .text .output }"))
        code = fenced(source, "python")
        installs = source.startswith(INSTALL)
        if installs or cell["metadata"].get("jupyter", {}).get("source_hidden"):
            drawn = any(output.startswith("![") for output in outputs)
            label = "Installation" if installs else "Code of this figure" if drawn else "Code"
            parts += [*outputs, folded(form or label, code)]
        else:
            parts += [code, *outputs]
    return "\n\n".join(parts) + "\n", figures


def title(source: str) -> str:
    """Returns the title that a cell writes out for its figure, or else for its first axes."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # of IPython's own commands
        return ""
    given = [
        (TITLES.index(call.func.attr), call.args[0])
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in TITLES and call.args
    ]
    given += [(len(TITLES), x.value) for call in calls for x in call.keywords if x.arg == "title"]
    for _, node in sorted(given, key=lambda found: found[0]):
        match node:
            case ast.Constant(value=str(text)):
                return re.sub(r"[\[\]\n$\\]", "", text)
            case _:
                pass
    return ""


def folded(label: str, block: str) -> str:
    """Returns a block that a reader can open."""
    return f'??? code "{label}"\n\n' + re.sub(r"^(?=.)", "    ", block, flags=re.MULTILINE)


def fenced(text: str, kind: str) -> str:
    """Returns a block of code within a fence longer than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{kind}\n{text}\n{fence}"


def on_post_build(config: MkDocsConfig) -> None:
    """Mends the search: nodes of lunr's tree of words have names that digits make ambiguous.

    Such trees had words that the index has not, and queries failed or did not end.
    """
    (worker,) = Path(config.site_dir).glob("assets/javascripts/workers/search.*.min.js")
    before, found, after = worker.read_text().partition(NODE_NAME)
    if not found or NODE_NAME in after:
        raise PluginError(f"{worker} names nodes in another way")
    worker.write_text(f'{before}{NODE_NAME}+","{after}')


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to notebooks at their pages, ranks the page in the search, lists the API."""
    name = page.file.src_uri
    boost = REFERENCE if name.startswith(f"{NOTEBOOKS}/") else BOOSTS.get(name, 1)
    page.meta["search"] = {"boost": boost, "exclude": name in NOT_SEARCHED}
    if SUMMARY in markdown:
        root = Path(config.config_file_path).parent
        markdown = markdown.replace(SUMMARY, summary(markdown, root))
    return TO_NOTEBOOK.sub(r"](notebooks/\1.md)", markdown)


def summary(markdown: str, root: Path) -> str:
    """Returns a table of the names that a page documents, by group, with their first lines."""
    package = griffe.load("adam_jax", search_paths=[root], allow_inspection=False)
    rows, group = ["| Name | What it does |", "|---|---|"], None
    for entry in ENTRY.finditer(markdown):
        if entry["group"]:
            group = entry["group"]
            continue
        if group:
            anchor = re.sub(r"[^\w]+", "-", group.lower())
            rows.append(f"| **[{group}](#{anchor})** | |")
            group = None
        name = entry["name"].removeprefix("adam_jax.")
        docstring = package[name].docstring
        if not docstring:
            raise PluginError(f"{entry['name']} has no docstring")
        line = docstring.value.partition("\n")[0]
        rows.append(f"| [`{name}`](#{entry['name']}) | {line} |")
    return "\n".join(rows)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns equations into MathML and figures into links, names types, keeps code unsearched."""
    name = page.file.src_uri

    def converted(match: re.Match[str]) -> str:
        tex = html.unescape(match["tex"]).strip()
        display = match["tag"] == "div"
        try:
            mathml = MATHML.convert_with_local_state(tex, displaystyle=display)
        except LatexError as error:
            raise PluginError(f"{name}: {tex}\n{error}") from error
        return f'<div class="equation">{mathml}</div>' if display else mathml

    def linked(match: re.Match[str]) -> str:
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', match[0]))
        if not attributes.get("alt"):
            raise PluginError(f"{name}: no alternative text for {attributes.get('src')}")
        return f'<a class="figure" href="{attributes["src"]}" title="Enlarge">{match[0]}</a>'

    references: Any = config.plugins["autorefs"]
    for anchor in TYPE.findall(content):
        references.register_anchor(page, anchor)
    content = EQUATION.sub(converted, content)
    content = IMAGE.sub(linked, content)
    return SOURCE.sub('<details class="mkdocstrings-source" data-search-exclude>', content)
