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

# Hypothesis draws the same examples in every run, so a failure can be reproduced anywhere.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Sharding needs several devices. JAX reads this option when it first looks for devices.
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
    """Deselects what only --full runs: cases marked `full`, and all but a covering set.

    Marks tests that are not slow as `fast`. In tests that run over all optimizers or remainders,
    only a few of these are fast.
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
        # The whole module may have the mark, and some of its tests have no parameters.
        many = len(of_one_test) > 1 and of_one_test[0].get_closest_marker("covering")
        kept.update(covering(of_one_test) if many else of_one_test)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def covering(items):
    """Returns cases of a test in which each value of each of its parameters occurs.

    Of the rows of the table of optimizers, each trait occurs, and each fast row. A hash of the
    test's name breaks ties, so different tests run different combinations.
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
    """Runs a test in both of JAX's modes; its value is True where float64 is available."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def standard_promotion():
    """Lets code of other packages mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def small_leaves_in_int8():
    """Stores small leaves in int8 too: contracts hold for any size, and small leaves run faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_storage, "SMALLEST_INT8_LEAF", 1)
        patch.setattr(_storage, "SHORTEST_INT8_ROW", 1)
        yield
