"""Runs other packages' own tests with optax's Adam, and again with ours in its place.

    uv run --group clients tests/endurance/clients.py
    uv run --group clients tests/endurance/clients.py numpyro blackjax

pip downloads the sources of each package in the installed version. Its tests run unchanged; pytest
loads this file as a plugin, which puts our functions wherever optax has its own. Under `jit` an
update counts once for each trace.

DIFFERENCES gives the reason for each test that passes with optax's and fails with ours. Any other
difference is an error.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import optax
import pytest

import adam_jax
from adam_jax import _transformation

# The files and tests that step Adam. Other tests step something else, for minutes.
TESTS = {
    "blackjax": (
        "tests/adaptation/test_adaptation.py tests/vi/test_fullrank_vi.py "
        "tests/vi/test_meanfield_vi.py",
        "VI or chees",
    ),
    "flax": (
        "tests/cursor_test.py tests/nnx/ema_test.py tests/nnx/integration_test.py "
        "tests/nnx/mutable_array_test.py tests/nnx/optimizer_test.py tests/nnx/spmd_test.py",
        "not linesearch",
    ),
    "numpyro": ("test/test_optimizers.py", ""),
    "optax": (
        "optax/_src/alias_test.py optax/_src/combine_test.py optax/_src/float64_test.py "
        "optax/_src/sharding_test.py optax/_src/transform_test.py "
        "optax/contrib/_complex_valued_test.py optax/contrib/_galore_test.py "
        "optax/contrib/_schedule_free_test.py optax/schedules/_inject_test.py "
        "optax/transforms/_accumulation_test.py optax/transforms/_combining_test.py "
        "optax/tree_utils/_state_utils_test.py",
        "not LBFGS and not mixed_precision",
    ),
}
INTEGERS = "takes whole numbers for parameters, which ours refuses"
LESS_EXACT = "compares with a bias correction of optax, which is off by 1e-5"
DIFFERENCES = {
    "CursorTest": INTEGERS,
    "ExtraArgsTest::test_extra_args": INTEGERS,
    "test_rms_match_adam": LESS_EXACT,
    "test_schedule_free_adamw": LESS_EXACT,
    "test_explicit_dtype": "wants nu in the parameters' dtype, or mu in complex64",
    "test_mu_dtype_controls_moment_dtype": "wants nu in bfloat16 for bfloat16 parameters",
}


# The plugin

calls = 0


def pytest_addoption(parser):
    parser.addoption("--ours", action="store_true", help="put adam_jax's functions into optax")


def pytest_configure(config):
    if not config.getoption("ours"):
        return
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "optax"]
    for name in dir(adam_jax):
        theirs = getattr(optax, name, None)
        for module in modules:
            if callable(theirs) and getattr(module, name, None) is theirs:
                setattr(module, name, getattr(adam_jax, name))
    update = _transformation._update

    def counted(*args):
        global calls
        calls += 1
        return update(*args)

    _transformation._update = counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = calls
    try:
        return (yield)
    finally:
        item.user_properties.append(("updates", calls - before))


# The command


class Outcome(NamedTuple):
    passed: bool
    updates: int  # by our functions


def download(package, version, directory):
    """Downloads the package's sources and returns their directory."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", package, "--dest", directory, f"{package}=={version}"]
    subprocess.run(command, check=True)
    (archive,) = directory.glob(f"{package}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / f"{package}-{version}"


def outcomes(sources, files, keywords, *options):
    """Returns the outcome of each test that was not skipped, by its name."""
    report = sources / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "clients", "-p", "no:cacheprovider"]
    command += ["-W", "ignore", f"--junitxml={report}", "-k", keywords, *options, *files.split()]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    run = subprocess.run(command, cwd=sources, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode not in (0, 1):  # 1: some tests failed
        sys.exit(run.stdout)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {part.tag for part in case}
        if "skipped" not in kinds:
            name = f"{case.get('classname')}::{case.get('name')}"
            updates = case.find("properties/property[@name='updates']")
            found[name] = Outcome(
                not kinds & {"failure", "error"},
                0 if updates is None else int(updates.attrib["value"]),
            )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(TESTS)}")
    packages = parser.parse_args().packages or TESTS
    print("| package | tests | pass with optax's | with ours | step ours | updates by ours |")
    print("|---|---|---|---|---|---|")
    different = []
    for package in packages:
        version = importlib.metadata.version(package)
        with tempfile.TemporaryDirectory() as directory:
            sources = download(package, version, Path(directory))
            theirs = outcomes(sources, *TESTS[package])
            ours = outcomes(sources, *TESTS[package], "--ours")
        passed, passed_with_ours = (sum(o.passed for o in x.values()) for x in (theirs, ours))
        stepped = sum(o.updates > 0 for o in ours.values())
        updates = sum(o.updates for o in ours.values())
        print(
            f"| {package} {version} | {len(theirs)} | {passed} | {passed_with_ours} | {stepped} | "
            f"{updates} |",
            flush=True,
        )
        if theirs.keys() != ours.keys() or not stepped:
            sys.exit(f"{package}: the swap did not take place, or other tests ran")
        different += [name for name in theirs if theirs[name].passed and not ours[name].passed]
    unexplained = False
    for name in different:
        reasons = [reason for part, reason in DIFFERENCES.items() if part in name]
        unexplained |= not reasons
        print(f"{name}: {' '.join(reasons) or 'NOT EXPLAINED'}")
    sys.exit(unexplained)


if __name__ == "__main__":
    main()
