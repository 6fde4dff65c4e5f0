import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Array shapes and dtypes in the annotations are checked at run time, in tests only.
with install_import_hook("adam_jax._moments", "beartype.beartype"):
    import adam_jax  # noqa: F401

# The same examples in every run: what fails here fails everywhere, and a run says what it tried.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# For what is sharded. It has to be said before the first device is looked for.
jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
