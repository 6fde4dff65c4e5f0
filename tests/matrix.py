"""What is checked, and where: a page of the documentation, made of the reports of test runs.

    uv run pytest --junitxml out/cpu.xml
    uv run --group compilers pytest tests/compiled --junitxml out/compiled.xml
    uv run tests/matrix.py out/cpu.xml out/compiled.xml > docs/tests.md

The report of the first command on a machine with a GPU makes one more column:

    uv run tests/matrix.py out/cpu.xml out/compiled.xml --ran "H200, 2027-01-31" out/h200.xml
"""

import argparse
import ast
import collections
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

CPU = "ran on a CPU"
COMPILED = {"v5e": "compiled for a TPU v5e", "h100": "compiled for an H100"}
NOTEBOOKS = "notebooks"
HEADER = """\
# What is checked, and where

Made by `tests/matrix.py` of the reports of the test runs, and compared with them in CI: nothing
below is typed. A number is how many cases of a test passed. "Compiled" is a program that the
compiler for a device makes on any machine; it is read, and run in NumPy, but not on the device.
CI has no GPU: [what ran on one](devices.md#on-a-gpu) is said elsewhere.
"""


def results(report, place=None):
    """The file, test, parameters, place, outcome and its reason of each case in a report.

    A test in tests/compiled says by one of its parameters for which device it compiles.
    """
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.get("name").removesuffix("]").partition("[")
        file = case.get("classname").replace(".", "/") + ".py"
        if not Path(file).exists():
            file = NOTEBOOKS
        device = re.search(rf"\b({'|'.join(COMPILED)})\b", parameters)
        outcome, reason = "passed", ""
        for part in case:
            if part.tag in ("failure", "error"):
                outcome = "failed"
            elif part.tag == "skipped":
                outcome = "falls short" if part.get("type") == "pytest.xfail" else "skipped"
                reason = part.get("message")
        where = place or (COMPILED[device[0]] if device else CPU)
        yield file, test, parameters, where, outcome, reason


def contents(file, tests):
    """What a test file is about (its docstring's first line), and its tests in order."""
    if file == NOTEBOOKS:
        return "The notebooks, from their first cell to their last", sorted(tests)
    module = ast.parse(Path(file).read_text())
    names = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    return ast.get_docstring(module).splitlines()[0].rstrip("."), sorted(tests, key=names.index)


def table(name, rows, places):
    """A table of how many cases passed at each place."""
    yield f"| {name} | {' | '.join(places)} |"
    yield "|---" * (1 + len(places)) + "|"
    for row, passed in rows:
        yield f"| {row} | {' | '.join(str(passed[place] or '') for place in places)} |"


def page(found, places):
    """The page's lines."""
    tests = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    others = collections.defaultdict(list)
    for file, test, parameters, place, outcome, reason in found:
        passed = tests[file][test]
        if outcome == "passed":
            passed[place] += 1
        else:
            others[f"{outcome}: {reason}"].append(
                f"`{test}[{parameters}]`" if parameters else f"`{test}`"
            )
    yield HEADER
    total = sum(
        (passed for file in tests.values() for passed in file.values()), collections.Counter()
    )
    yield from table("", [("all tests", total)], places)
    for file in sorted(tests):
        title, names = contents(file, tests[file])
        rows = [(name.removeprefix("test_").replace("_", " "), tests[file][name]) for name in names]
        yield f"\n## {title}\n"
        yield from table(f"`{file}`", rows, places)
    if others:
        yield "\n## What does not pass\n"
    for reason in sorted(others):
        yield f"- {reason}. {', '.join(sorted(others[reason]))}"


def main():
    parser = argparse.ArgumentParser(description="Prints the page that says what is checked where.")
    parser.add_argument("cpu", help="the report of `uv run pytest`, in JUnit's XML")
    parser.add_argument("compiled", help="that of `uv run --group compilers pytest tests/compiled`")
    parser.add_argument(
        "--ran", nargs=2, metavar=("WHERE", "REPORT"), help="a GPU with a date, and its report"
    )
    options = parser.parse_args()
    # A set, since with the compilers installed the first report has what the second has.
    found = {*results(options.cpu), *results(options.compiled)}
    places = [CPU, *COMPILED.values()]
    if options.ran:
        where, report = options.ran
        places.append(f"ran on {where}")
        found |= {*results(report, places[-1])}
    print("\n".join(page(found, places)))


if __name__ == "__main__":
    main()
