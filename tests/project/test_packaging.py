"""The package as it is built, installed where nothing else is, imported and cited."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import adam_jax

ROOT = Path(__file__).parents[2]
DEPENDENCIES = {"jax", "jaxtyping", "numpy", "optax"}

# Run by the Python that has the wheel and its dependencies, and nothing more.
TRAIN = """
import importlib.metadata, json, pathlib
import adam_jax, jax, jax.numpy as jnp, optax

optimizer = adam_jax.master_weights(
    adam_jax.adamw(1e-2, mu_dtype="int8", nu_dtype="int8"), remainder="int8"
)
params = {"kernel": jnp.ones((256, 256), jnp.bfloat16)}
state = optimizer.init(params)

@jax.jit
def step(params, state):
    gradients = jax.grad(lambda p: jnp.sum(jnp.square(p["kernel"])))(params)
    updates, state = optimizer.update(gradients, state, params)
    return gradients, optax.apply_updates(params, updates), state

gradients, params, state = step(params, state)
arrays = jax.tree.leaves((gradients, params, state))
weights = adam_jax.master_params(params, state)["kernel"]
metadata = importlib.metadata.metadata("adam-jax")
print(json.dumps({
    "bytes": sum(x.nbytes for x in arrays) / params["kernel"].size,
    "least": float(weights.min()),
    "largest": float(weights.max()),
    "file": adam_jax.__file__,
    "version": adam_jax.__version__,
    "typed": pathlib.Path(adam_jax.__file__).with_name("py.typed").exists(),
    "metadata": {key: metadata.get_all(key) for key in set(metadata)},
}))
"""


def run(*command, **settings):
    """What a command prints; it has to succeed."""
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **settings
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def uv(*arguments, **settings):
    """Runs the uv that runs these tests, or else the one that is installed."""
    return run(os.environ.get("UV", "uv"), *arguments, "--quiet", **settings)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("built")
    uv("build", ROOT, "--out-dir", folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files(*folders):
    """The files below folders of the project, by their paths in it."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts]
    return {path.as_posix() for path in kept}


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(built):
    _, wheel = built
    of_package = {name for name in files("adam_jax") if name.endswith((".py", "/py.typed"))}
    info = f"adam_jax-{adam_jax.__version__}.dist-info"
    of_info = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert "adam_jax/py.typed" in of_package
    assert set(zipfile.ZipFile(wheel).namelist()) == of_package | of_info


@pytest.mark.slow
def test_the_sdist_has_all_that_its_tests_need(built, tmp_path):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    found = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    needed = files("adam_jax", "benchmarks", "examples", "tests")
    assert found >= needed | {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    # Every test can be collected there, with what it imports and the data it reads to do so. (In
    # this Python, adam_jax is what was installed. A conftest.py finds the other one only here.)
    options = ["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider", "tests"]
    run(sys.executable, "-m", "pytest", *options, cwd=unpacked)


@pytest.mark.slow
def test_the_wheel_trains_where_only_its_dependencies_are(built, tmp_path):
    _, wheel = built
    # In the versions of this environment, which uv need not fetch again.
    versions = tmp_path / "versions.txt"
    versions.write_text(
        "\n".join(
            f"{distribution.name}=={distribution.version}"
            for distribution in importlib.metadata.distributions()
            if distribution.name != "adam-jax"
        )
    )
    environment = tmp_path / "environment"
    uv("venv", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    uv("pip", "install", "--python", python, "--constraint", versions, wheel)
    # -I: neither this folder nor PYTHONPATH are searched, only the environment.
    found = json.loads(run(python, "-I", "-W", "error", "-c", TRAIN, cwd=tmp_path))

    assert Path(found["file"]).is_relative_to(environment)
    assert found["typed"]
    # A scale and a unit for each row of 256, and a few counts.
    assert found["bytes"] == pytest.approx(7 + 8 / 256, abs=0.001)
    # From 1, Adam's first step is the learning rate; weights have 16 bits, codes of moments 8.
    assert 0.98 < found["least"] <= found["largest"] < 0.995
    assert found["version"] == adam_jax.__version__

    metadata = found["metadata"]
    assert metadata["Name"] == ["adam-jax"]
    assert metadata["Version"] == [adam_jax.__version__]
    assert metadata["License-Expression"] == ["Apache-2.0"]
    assert metadata["Requires-Python"] == [">=3.11"]
    required = [re.fullmatch(r"([a-z]+)>=[\d.]+", line) for line in metadata["Requires-Dist"]]
    assert all(required), metadata["Requires-Dist"]
    assert sorted(match[1] for match in required if match) == sorted(DEPENDENCIES)
    assert "Provides-Extra" not in metadata


def packages(statement):
    """The top-level packages that a new Python has after a statement, without its own."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    modules = {name.partition(".")[0] for name in run(sys.executable, "-c", script).split()}
    return modules - sys.stdlib_module_names


@pytest.mark.slow
def test_importing_adam_jax_imports_little_beside_optax():
    beyond = packages("import adam_jax") - packages("import optax")
    assert "adam_jax" in beyond
    # wadler_lindig prints jaxtyping's types.
    assert beyond <= {"adam_jax", "jaxtyping", "wadler_lindig"}


@pytest.mark.slow
def test_the_table_of_import_times_is_printed():
    printed = run(sys.executable, "-W", "error", ROOT / "benchmarks", "imports", "--small")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    ratios = {row[0]: float(row[1]) for row in rows[2:]}
    assert ratios["`optax`"] == 1
    assert {"`adam_jax`", "`adam_jax`, after `optax`"} < set(ratios)
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_version_stands_in_one_place_and_leads_the_changelog():
    versions = re.findall(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0][0] == adam_jax.__version__
    assert all(re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", date) for _, date in versions)
    others = ("CITATION.cff", "mkdocs.yml", "pyproject.toml", "README.md")
    assert [x for x in others if f"{adam_jax.__version__}\n" in (ROOT / x).read_text()] == []


def test_citation_has_the_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^license: (.*)$", citation, re.MULTILINE) == ["Apache-2.0"]
