"""What README and docs show: their Python and commands run, and what they name exists."""

import collections
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest
from catalogue import BENCHMARKS
from jax import numpy as jnp
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import adam_jax

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


# ------------------------------------------------------------------------------------------ Python


def parse(page):
    """A page with its blocks of Python, which share a namespace."""
    return Document.parse(str(ROOT / page), PythonCodeBlockParser())


WITH_BLOCKS = [page for page, text in TEXTS.items() if "```" in text]
WITH_BLOCKS.remove("docs/recipes.md")  # its blocks share nothing: test_recipes.py


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_python_runs(page):
    """Also what is hidden in comments: the variables of the blocks, and assertions."""
    shown = 0
    for example in parse(page).examples():
        example.evaluate()
        shown += TEXTS[page][example.region.start] == "`"
    fences = re.findall(r"^ *```", TEXTS[page], re.MULTILINE)
    assert len(fences) == 2 * shown  # every block is one of Python


@pytest.mark.usefixtures("as_a_user")
def test_the_readme_trains_in_7_bytes():
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    losses, names = [], {}
    names["losses"] = losses
    exec(f"{code}    losses.append(loss)\n", names)
    (promised,) = re.findall(r"The loss falls from (\d\.\d) to (\d\.\d)", TEXTS["README.md"])
    assert promised == (f"{losses[0]:.1f}", f"{losses[-1]:.1f}")
    params, state = names["params"], names["state"]
    assert params["kernel"].dtype == jnp.bfloat16
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves((params, params, state)))
    # A row of 64 has a scale and a unit of 4 bytes each.
    assert memory / params["kernel"].size == pytest.approx(7 + 8 / 64, abs=0.01)


@pytest.mark.usefixtures("as_a_user")
def test_the_line_that_the_readme_changes():
    before, after = re.findall(r"^    optimizer = (.*?\))", TEXTS["README.md"], re.MULTILINE)
    optimizers = [eval(line, {"optax": optax, "adam_jax": adam_jax}) for line in (before, after)]
    params = {"kernel": jnp.ones((8, 8))}
    states = [optimizer.init(params) for optimizer in optimizers]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    updates = [
        optimizer.update(params, state, params)[0]
        for optimizer, state in zip(optimizers, states, strict=True)
    ]
    assert jnp.allclose(updates[0]["kernel"], updates[1]["kernel"], rtol=1e-5)


# ---------------------------------------------------------------------------------------- commands

COMMAND = re.compile(
    r"^ {4}((?:bash|pip|python|uv) (?:.*\\\n)*.*)$"  # may continue on the next line
    r"|`((?:bash|pip|python|uv) [^`]+)`",
    re.MULTILINE,
)
CI = (ROOT / ".ci" / "run").read_text()

# Commands that take seconds.
RUN = ["uv run benchmarks", "uv run benchmarks arithmetic"]

# The others, each with the reason, and with the test that does part of the same, if there is one.
# Those of benchmarks need none: their list has durations, and test_benchmarks.py runs them smaller.
NOT_RUN = {
    "bash .ci/run": "runs this test",
    "pip install .": "tests/project/test_packaging.py installs the wheel",
    "pip install adam-jax": "is not published yet",
    "uv run examples/gpt": "takes minutes: tests/project/test_examples.py",
    "uv run notebooks/store.py notebooks/NAME.ipynb": "changes a notebook",
    "uv run pytest --full": "takes hours: `uv run pytest`",
    "uv run pytest -m fast": "part of `uv run pytest`",
    "uv run pytest notebooks": "part of `uv run pytest`",
    "uv run --group compilers pytest tests/compiled --full": "takes hours: CI, without --full",
    "uv run --script tests/golden/make_golden.py": "needs torch and Keras",
    'uv run examples/gpt --setting "5 bytes"': "takes minutes: tests/project/test_examples.py",
    "uv run examples/embeddings.py": "takes minutes: tests/project/test_examples.py",
    # endurance
    "uv run tests/endurance/clients.py": "takes minutes: tests/endurance/test_clients.py",
    "uv run tests/endurance/fuzz.py --updates 100000": (
        "takes minutes: tests/endurance/test_fuzz.py"
    ),
    "uv run tests/endurance/kills.py": "takes minutes: tests/endurance/test_kills.py",
    "uv run tests/endurance/leaks.py": "takes minutes: tests/endurance/test_leaks.py",
    "uv run tests/endurance/long_runs.py": "takes minutes: tests/endurance/test_long_runs.py",
    "uv run --with torch tests/endurance/torch_round_trip.py": "needs torch: tests/test_torch.py",
}


def commands(text):
    """The commands in a page, each in one line and without its comment."""
    for line, inline in COMMAND.findall(text):
        joined = re.sub(r"\\\n\s*", "", line or inline)
        yield from re.sub(r"\s+#.*", "", joined).split(" && ")


COMMANDS = sorted({command for text in TEXTS.values() for command in commands(text)})
OF_BENCHMARKS = [command for command in COMMANDS if re.search(r" benchmarks \w", command)]
# Each script of ours in them, and the options that it gets there.
SCRIPTS = collections.defaultdict(set)
for script, options in re.findall(r"(\S+\.py|benchmarks \w+)(.*)", "\n".join(COMMANDS)):
    SCRIPTS[script] |= set(re.findall(r"--[\w-]+", options))


def takes_options(script):
    if script.startswith("benchmarks "):
        return True
    return (ROOT / script).is_file() and "argparse" in (ROOT / script).read_text()


def run(*arguments):
    """Returns what this Python prints; it has to succeed."""
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_each_command_runs_here_or_in_ci_or_has_a_reason():
    in_ci = {command for command in COMMANDS if re.search(rf'{re.escape(command)}[\s"]', CI)}
    # None is missing, superfluous or in two of the three.
    others = {*OF_BENCHMARKS} - in_ci - {*RUN}
    assert collections.Counter([*in_ci, *RUN, *NOT_RUN, *others]) == collections.Counter(COMMANDS)


@pytest.mark.parametrize("command", OF_BENCHMARKS)
def test_commands_name_benchmarks_of_the_list(command):
    name = command.partition(" benchmarks ")[2].split()[0]
    assert name in [*BENCHMARKS, "NAME"]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_commands_run(command):
    assert run(*shlex.split(command.removeprefix("uv run ")))


@pytest.mark.parametrize("command", COMMANDS)
def test_files_in_commands_exist(command):
    for word in shlex.split(command):
        assert "/" not in word or list(ROOT.glob(word.replace("NAME", "*"))), word


@pytest.mark.slow
@pytest.mark.parametrize("script", [*filter(takes_options, sorted(SCRIPTS))])
def test_options_are_in_the_help(script, end_of):
    code, shown, _ = end_of(*script.split(), "--help")
    assert code in (0, None)
    assert [option for option in SCRIPTS[script] if option not in shown] == []


def test_the_last_command_of_the_readme_is_that_of_ci():
    command = re.findall(r"^    (pip install uv && .*)$", TEXTS["README.md"], re.MULTILINE)[-1]
    assert command == "pip install uv && uv run pytest"
    assert command in CI


# ------------------------------------------------------------------------------------------- names

# A file of tests may be named without its folder.
NAMED = re.compile(
    r"\b((?:adam_jax|benchmarks|docs|examples|notebooks|tests)/[\w/.]*\w|test_\w+\.py)"
    r"(?:::(test_\w+))?"
)


@pytest.mark.parametrize("page", [*TEXTS, "NOT_RUN"])
def test_files_and_tests_that_are_named_exist(page):
    text = TEXTS.get(page) or str(NOT_RUN)
    missing = []
    for name, function in NAMED.findall(text):
        pattern = name.replace("NAME", "*") if "/" in name else f"tests/**/{name}"
        files = list(ROOT.glob(pattern))
        if not files or (function and f"def {function}(" not in files[0].read_text()):
            missing.append(f"{name}::{function}" if function else name)
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page):  # mkdocs checks those in docs/
    links = re.findall(r"\]\(([^)]+)\)", TEXTS[page])
    assert links
    assert [x for x in links if not x.startswith("https://") and not (ROOT / x).is_file()] == []
