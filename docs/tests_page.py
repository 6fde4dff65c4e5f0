"""The page that says what is checked where, made from the reports of test runs.

`docs/hooks.py` puts it into the site. The reports are those that CI leaves in out/; others may lie
beside them, such as that of a machine with a GPU:

    uv run pytest --junitxml "out/H200, 2027-01-31.xml"
"""

import ast
import collections
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CPU = "ran on a CPU"
REPORTS = {
    "cpu": CPU,
    "compiled": CPU,
    "oldest": "with the oldest versions",
    "newest": "with the newest versions",
}
COMPILED = {"v5e": "compiled for a TPU v5e", "h100": "compiled for an H100"}
NOTEBOOKS = "notebooks"
HEADER = """\
# What is checked, and where

A number says how many cases of a test passed. By default a test may run a covering set of its
cases; `uv run pytest --full` runs all. "Compiled" means a program that the compiler for a device
makes on any machine; tests read it and run it in NumPy, but not on the device. CI has no GPU:
[this](devices.md#on-a-gpu) was run on one.
"""
NO_REPORTS = "out/ had no reports of tests when this page was built: `bash .ci/run` makes them.\n"


class Result(NamedTuple):
    """What became of one case of a test."""

    file: str
    test: str
    parameters: str
    place: str
    outcome: str
    reason: str


def results(report: Path) -> Iterator[Result]:
    """The results in a report, in the XML of JUnit.

    A test in tests/compiled tells by one of its parameters for which device it compiles.
    """
    for case in ElementTree.parse(report).iter("testcase"):
        # pytest-xdist adds the group of a test to its name.
        name = re.sub(r"@[^@\]]*$", "", case.get("name", ""))
        test, _, parameters = name.removesuffix("]").partition("[")
        file = case.get("classname", "").replace(".", "/") + ".py"
        if not Path(file).exists():
            file = NOTEBOOKS
        device = None
        if file.startswith("tests/compiled/"):
            device = re.search(rf"\b({'|'.join(COMPILED)})\b", parameters)
        outcome, reason = "passed", ""
        for part in case:
            if part.tag in ("failure", "error"):
                outcome = "failed"
            elif part.tag == "skipped":
                outcome = "falls short" if part.get("type") == "pytest.xfail" else "skipped"
                reason = part.get("message", "")
        ran = REPORTS.get(report.stem, f"ran on {report.stem}")
        place = COMPILED[device[0]] if device else ran
        yield Result(file, test, parameters, place, outcome, reason)


def contents(file: str, tests: Iterable[str]) -> tuple[str, list[str]]:
    """What a test file is about (its docstring's first line), and its tests in order."""
    if file == NOTEBOOKS:
        return "The notebooks, from their first cell to their last", sorted(tests)
    module = ast.parse(Path(file).read_text())
    names = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    title = (ast.get_docstring(module) or file).splitlines()[0].rstrip(".")
    # A report may be older than the file.
    return title, [name for name in names if name in tests] + sorted(set(tests) - set(names))


def table(
    name: str, rows: Iterable[tuple[str, collections.Counter[str]]], places: list[str]
) -> Iterator[str]:
    """A table of how many cases passed at each place."""
    yield f"| {name} | {' | '.join(places)} |"
    yield "|---" * (1 + len(places)) + "|"
    for row, passed in rows:
        yield f"| {row} | {' | '.join(str(passed[place] or '') for place in places)} |"


def page(folder: Path) -> str:
    """The page, in Markdown."""
    # A set, since with the compilers installed the first report has what the second one has.
    found = {result for report in sorted(folder.glob("*.xml")) for result in results(report)}
    if not found:
        return f"{HEADER}\n{NO_REPORTS}"
    seen = {result.place for result in found}
    known = [*dict.fromkeys([*REPORTS.values(), *COMPILED.values()])]
    places = [place for place in known if place in seen] + sorted(seen - set(known))
    tests: dict[str, dict[str, collections.Counter[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(collections.Counter)
    )
    others: dict[str, list[str]] = collections.defaultdict(list)
    for file, test, parameters, place, outcome, reason in sorted(found):
        passed = tests[file][test]
        if outcome == "passed":
            passed[place] += 1
        else:
            case = f"`{test}[{parameters}]`" if parameters else f"`{test}`"
            others[f"{outcome}: {reason}"].append(case)
    total = sum((n for file in tests.values() for n in file.values()), collections.Counter[str]())
    lines = [HEADER, *table("", [("all tests", total)], places)]
    for file in sorted(tests):
        title, names = contents(file, tests[file])
        rows = [(name.removeprefix("test_").replace("_", " "), tests[file][name]) for name in names]
        lines += [f"\n## {title}\n", *table(f"`{file}`", rows, places)]
    if others:
        lines.append("\n## What does not pass\n")
    for reason in sorted(others):
        lines.append(f"- {reason}. {', '.join(sorted(set(others[reason])))}")
    return "\n".join(lines) + "\n"
