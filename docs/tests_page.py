"""Makes the page of what is checked where, from the reports of test runs.

`docs/hooks.py` puts it into the site. CI leaves its reports in out/. Others may be added there,
such as one from a machine with a GPU:

    uv run pytest --junitxml "out/H200, 2027-01-31.xml"
"""

import ast
import collections
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CPU = "CPU"
REPORTS = {
    "cpu": CPU,
    "compiled": CPU,
    "oldest": "CPU, oldest versions",
    "newest": "CPU, newest versions",
}
COMPILED = {"v5e": "compiled for a TPU v5e", "h100": "compiled for an H100"}
NOTEBOOKS = "notebooks"
HEADER = """\
# What is checked, and where

This page lists each test of the reports, with the number of its cases that passed in each place.

- **CPU**: the tests ran on a CPU, with the versions of the project's environment, the oldest
  supported ones or the newest.
- **Compiled for**: a device's compiler, which runs on any machine, made a program. The test reads
  it and runs it in NumPy. Nothing ran on the device.
- By default a test may run a covering set of its cases. `uv run pytest --full` runs all.
- CI has no GPU. [These tests](devices.md#on-a-gpu) ran on one.
"""
NO_REPORTS = """\
There are no test reports yet. `bash .ci/run` leaves them in `out/`; then build this page again.
"""


class Result(NamedTuple):
    """Tells what became of one case of a test."""

    file: str
    test: str
    parameters: str
    place: str
    outcome: str
    reason: str


def results(report: Path) -> Iterator[Result]:
    """Yields the results in a report, in the XML of JUnit.

    One of the parameters of a test in tests/compiled names the device that it compiles for.
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
                outcome = "known shortcoming" if part.get("type") == "pytest.xfail" else "skipped"
                reason = part.get("message", "")
        ran = REPORTS.get(report.stem, report.stem)
        place = COMPILED[device[0]] if device else ran
        yield Result(file, test, parameters, place, outcome, reason)


def contents(file: str, tests: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the subject of a test file (its docstring's first line), and its tests in order."""
    if file == NOTEBOOKS:
        return "The notebooks, run from their first cell to their last", sorted(tests)
    module = ast.parse(Path(file).read_text())
    names = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    title = (ast.get_docstring(module) or file).splitlines()[0].rstrip(".")
    # A report may be older than the file.
    return title, [name for name in names if name in tests] + sorted(set(tests) - set(names))


def table(
    name: str, rows: Iterable[tuple[str, collections.Counter[str]]], places: list[str]
) -> Iterator[str]:
    """Yields the lines of a table: how many cases passed at each place."""
    yield f"| {name} | {' | '.join(places)} |"
    yield "|---|" + "---:|" * len(places)
    for row, passed in rows:
        yield f"| {row} | {' | '.join(str(passed[place] or '') for place in places)} |"


def page(folder: Path) -> str:
    """Returns the page, in Markdown."""
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
        lines.append("\n## Cases that did not pass\n")
    for reason in sorted(others):
        lines.append(f"- {reason}. {', '.join(sorted(set(others[reason])))}")
    return "\n".join(lines) + "\n"
