import collections
import itertools
import re
import zlib

import hypothesis
import jax
import pytest
from covering import cover
from jaxtyping import install_import_hook

# Array shapes and dtypes in the annotations are checked at run time, in tests only.
with install_import_hook("adam_jax._moments", "beartype.beartype"):
    import adam_jax  # noqa: F401
from adam_jax import _storage

# The same examples in every run: what fails here fails everywhere, and a run says what it tried.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Sharding needs several devices. This has to be set before the first one is looked for.
jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run every case, not only a covering set")


SLOW_FOLDERS = {"compiled", "endurance", "notebooks"}
LONG_NOTEBOOKS = {"02", "03", "04", "05", "06"}  # each takes minutes
FAST = {"row": {"adamw", "adamw-int8"}, "remainder": {"int8", "int16"}}


def is_fast(item):
    folders = item.path.relative_to(item.config.rootpath).parts
    if {"slow", "full"} & {mark.name for mark in item.iter_markers()}:
        return False
    if SLOW_FOLDERS.intersection(folders):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    names = {key: getattr(params[key], "name", params[key]) for key in FAST if key in params}
    return all(name in FAST[key] for key, name in names.items())


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Leaves out what only --full runs: cases marked `full`, and all but a covering set.

    Marks as fast what is not slow, and in tests of all optimizers or remainders a few of these.
    """
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.name[:2] in LONG_NOTEBOOKS:
            item.add_marker("full")
        if is_fast(item):
            item.add_marker("fast")
    if config.getoption("full"):
        return
    cases = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("full"):
            cases[item.parent, getattr(item, "originalname", item.name)].append(item)
    kept = set()
    for of_one_test in cases.values():
        # A module may be marked, with tests in it that have no parameters.
        many = len(of_one_test) > 1 and of_one_test[0].get_closest_marker("covering")
        kept.update(covering(of_one_test) if many else of_one_test)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def covering(items):
    """The cases of a test that it takes for each value of each of its parameters to occur.

    Of rows of the table of optimizers: for each of their traits to occur, and the fast ones.
    Names of tests decide among equals, so that other tests meet other combinations.
    """

    def parts(param):
        traits = getattr(param, "traits", None)
        if traits is None:
            return {id(param)}
        return traits | {param.name}.intersection(FAST["row"])

    def values(item):
        params = item.callspec.params
        names = [mark.args[0] for mark in item.iter_markers("parametrize")]
        axes = [tuple(re.findall(r"\w+", x)) if isinstance(x, str) else tuple(x) for x in names]
        axes += [(name,) for name in params.keys() - set().union(*axes)]  # parameters of fixtures
        found = set()
        for axis in axes:
            found |= {(axis, *x) for x in itertools.product(*(parts(params[n]) for n in axis))}
        return found

    shuffled = sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()), reverse=True)
    return cover(shuffled, values)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    """Runs a test in both of JAX's modes; the value says whether float64 is available."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def standard_promotion():
    """For tests in which code that is not ours mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def small_leaves_in_int8():
    """For contracts, which hold for leaves of any size: small ones are quicker to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_storage, "SMALLEST_INT8_LEAF", 1)
        patch.setattr(_storage, "SHORTEST_INT8_ROW", 1)
        yield
