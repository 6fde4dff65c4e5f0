"""Compiles for a TPU and a GPU by their compilers alone, without the devices."""

import importlib.util
import os

import jax

COMPILERS = {
    "libtpu": "libtpu",
    "jax_cuda12_plugin": "jax-cuda12-plugin",
    "nvidia": "nvidia-cuda-nvcc-cu12",
}
MISSING = [name for module, name in COMPILERS.items() if importlib.util.find_spec(module) is None]

if MISSING:
    collect_ignore_glob = ["*.py"]
else:
    # JAX finds the CPU alone as a device, and several processes may each load a compiler.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def pytest_report_header():
    if MISSING:
        return (
            f"tests/compiled: left out, without {', '.join(MISSING)}; "
            "to run them: uv run --group compilers pytest tests/compiled"
        )
    return None


def pytest_generate_tests(metafunc):
    if "setting" in metafunc.fixturenames:
        import steps

        settings = steps.grid()
        if not metafunc.config.getoption("full"):
            settings = steps.covering(settings)
        metafunc.parametrize("setting", settings, ids=str)
