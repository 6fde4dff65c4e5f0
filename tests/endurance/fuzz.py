"""Fuzzes random trees, shapes, dtypes, optimizers, formats, wrappers and values of all classes.

    uv run tests/endurance/fuzz.py --updates 100000 --seed 0

Compiling takes long, so a case is one structure with many steps. Only the seed and its number
determine a case. Every output of every step is checked:

- finite gradients: no NaN or infinity in updates and state; nu is never negative; codes are within
  their range, and so nu within its row's scale; updates follow the paper from the stored moments;
- counts go up by one; trees, shapes and dtypes are as documented, and stay the same;
- a NaN or an infinity, of any bit pattern: no exception, and only its coordinate (in int8 its row)
  differs from a run without it; `optax.apply_if_finite` keeps it out;
- a wrong input: ValueError or TypeError, with the path of the leaf.

The script counts what it tried. With a failure it prints the case, which `--case` repeats.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import math
import operator
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# pytest finds modules in this folder by itself, a script does not.
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from optimizers import ROWS

import adam_jax
from adam_jax import Int8Moment

ROW = {row.name: row for row in ROWS}
CHUNKS = 3  # of finite steps; another two are with and without a NaN or an infinity

SHAPES = [(), (1,), (7,), (5, 3), (2, 1, 3, 1, 2), (0,), (3, 0, 2), (1, 1)]
LARGE = [(4096,), (4095,), (64, 64), (128, 33), (4, 3, 351), (2, 2, 1, 1, 1024), (70_000,)]
REAL = ["float32", "bfloat16", "float16"]
WIDE = {"float64": "float64", "complex64": "complex64", "complex128": "complex128"}
LOW = ("bfloat16", "float16")
DECAYS = [0.0, 0.3, 0.5, 0.9, 0.99, 0.999, 0.9999999]
WRAPPERS = [
    "average_params",
    "apply_if_finite",
    "clip_by_global_norm",
    "inject_hyperparams",
    "masked",
    "multi_transform",
    "none remainder",
    "int8 remainder",
    "int16 remainder",
    "float32 remainder",
]
EACH_LEAF_ALONE = {"none", "average_params", "masked", "multi_transform"}
OURS = {"none", "average_params"}  # and remainders: their errors are documented


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter, and the dtype of its gradient, or None for a gradient that is None."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    gradient: str | None = "float32"

    @property
    def trained(self):
        return self.gradient is not None

    @property
    def complex(self):
        return self.dtype.startswith("complex")


@dataclasses.dataclass(frozen=True)
class Case:
    row: str
    tree: Any  # of Leaf
    formats: tuple[str | None, str | None] = (None, None)  # of mu and nu
    wrapper: str = "none"
    settings: dict[str, float] = dataclasses.field(default_factory=dict)
    rates: str = "number"  # or "schedule" or "tree"
    masked: bool = False  # whether only every second leaf decays
    mode: str = "scan"  # one program for all steps; or "jit", one for each; or "eager"
    x64: bool = False
    steps: int = 8  # in a chunk
    seed: int = 0  # of the values

    @property
    def remainder(self):
        return self.wrapper.split()[0] if self.wrapper.endswith("remainder") else None

    @property
    def leaves(self):
        return jax.tree.leaves(self.tree)

    @property
    def wild(self):
        """Whether hyperparameters and parameters may make an update overflow its dtype."""
        return self.wrapper == "none" and self.row != "average_params"


# Cases that once failed, and corners that are seldom drawn. These always run.
REGRESSIONS = [
    Case("adamw", {}),
    Case("adamw", [None, {"a": (), "b": None}], mode="eager"),
    Case("adam", Leaf((), gradient=None)),
    Case("adam", [Leaf((0, 5)), Leaf((3, 0))], ("int8", "int8")),
    # float64 gradients whose squares are finite, but not in the float32 that stores them.
    Case("adam", Leaf((7,), "float32", "float64"), x64=True),
    Case("nadam", Leaf((7,), "float64", "float64"), ("bfloat16", "float32"), x64=True),
    Case("adam", Leaf((64, 64), "float64", "float64"), ("int8", "int8"), x64=True),
    Case("adam", Leaf((64, 64), "float64", "float64"), ("float32", "int8"), x64=True),
    Case("adamw", Leaf((7,), "bfloat16", "float64"), wrapper="int16 remainder", x64=True),
    # A NaN, which XLA's maximum of a row may lose on a CPU.
    Case("adam", Leaf((64, 64)), ("int8", "int8")),
    Case("adamw-int8", Leaf((128, 33)), ("int8", "int8"), settings={"b1": 0.9999999, "b2": 0.0}),
    Case("scale_by_nadam", Leaf((5,), "float16", "float16"), settings={"b1": 0.9, "b2": 0.0}),
    Case("adamax-bfloat16", Leaf((5,)), ("bfloat16", "bfloat16"), settings={"eps": 3e38}),
    Case("adamw", Leaf((5,), "float16", "float16"), wrapper="float32 remainder"),
    # The magnitude of a finite complex number may be infinite.
    Case("adam", Leaf((64, 64), "complex64", "complex64"), (None, "int8")),
    # No leaf shows how moments are stored.
    Case("adam-bfloat16", {}, ("bfloat16", "bfloat16")),
]


# ---------------------------------------------------------------- drawing a case


def draw_case(seed, number, steps):
    rng = np.random.default_rng([seed, number])
    x64 = bool(rng.random() < 0.2)
    row = ROWS[rng.integers(len(ROWS))]
    wrapper = "none" if rng.random() < 0.5 else str(rng.choice(WRAPPERS))
    formats = draw_formats(rng, row)
    real = REAL + ["float64"] * x64
    complexes = ["complex64", "complex128"][: 1 + x64]
    if wrapper == "inject_hyperparams":  # hyperparameters get the one dtype of the parameters
        real, complexes = [str(rng.choice(real))], []
    if formats[0] in ("bfloat16", "int8") or wrapper == "clip_by_global_norm":
        complexes = []
    frozen = wrapper in OURS or "remainder" in wrapper
    modes = ["scan", "scan", "jit", "eager"]
    if wrapper == "apply_if_finite":  # each eager step compiles its condition again
        modes.remove("eager")
    case = Case(
        row.name,
        draw_tree(rng, lambda: draw_leaf(rng, real, complexes, frozen)),
        formats,
        wrapper,
        mode=str(rng.choice(modes)),
        x64=x64,
        steps=steps,
        seed=int(rng.integers(2**31)),
    )
    if wrapper != "inject_hyperparams":
        rates = str(rng.choice(["number", "schedule", "tree"], p=[0.6, 0.2, 0.2]))
        case = dataclasses.replace(case, rates=rates, masked=bool(rng.random() < 0.3))
    return dataclasses.replace(case, settings=row.taken(draw_settings(rng, case.wild)))


def draw_formats(rng, row):
    """Returns the row's formats, or others that its optimizer accepts."""
    if not row.takes("mu_dtype") or rng.random() < 0.7:
        return row.mu_format, row.nu_format
    mu = [None, "bfloat16"] + ["int8"] * ("adamax" not in row.name)
    nu = [None, "bfloat16"] + ["int8"] * ("adamax" not in row.name and "amsgrad" not in row.name)
    return mu[rng.integers(len(mu))], nu[rng.integers(len(nu))]


def draw_tree(rng, draw_leaf):
    """Returns a tree of one to five leaves, now and then none, in containers of every kind."""
    if rng.random() < 0.03:
        return [{}, (), [], {"a": None, "b": ()}][rng.integers(4)]
    nodes = [draw_leaf() for _ in range(rng.integers(1, 6))]
    if len(nodes) == 1 and rng.random() < 0.5:
        return nodes[0]
    nodes += [None, {}][: rng.integers(3)]
    while len(nodes) > 1 or isinstance(nodes[0], Leaf):
        n = min(rng.integers(1, 4), len(nodes))
        children, nodes = nodes[:n], nodes[n:]
        kinds = [list, tuple, lambda nodes: {f"k{i}": node for i, node in enumerate(nodes)}]
        kinds += [lambda nodes: Layer(*nodes)] if n == 2 else []
        nodes.append(kinds[rng.integers(len(kinds))](children))
    return nodes[0]


def draw_leaf(rng, real, complexes, frozen):
    shapes = LARGE if rng.random() < 0.25 else SHAPES
    shape = shapes[rng.integers(len(shapes))]
    dtypes = complexes if complexes and rng.random() < 0.15 else real
    dtype = str(rng.choice(dtypes))
    gradient = dtype if rng.random() < 0.6 else str(rng.choice(dtypes))
    return Leaf(shape, dtype, None if frozen and rng.random() < 0.1 else gradient)


def draw_settings(rng, wild):
    if not wild:  # with these hyperparameters no step is long: b1^2 < b2
        b1, b2 = [(0.9, 0.999), (0.0, 0.9), (0.5, 0.9999999), (0.3, 0.5)][rng.integers(4)]
        return {"b1": b1, "b2": b2, "learning_rate": 0.01, "weight_decay": 0.1}
    choices = {
        "b1": DECAYS,
        "b2": DECAYS,
        "eps": [1e-8, 0.0, 1e-30, 1.0, 3e38],
        "eps_root": [0.0, 0.0, 1e-30, 1.0, 1e38],
        "learning_rate": [0.01, 0.0, 1e-8, 1.0, -1.0, 1e6, 1e30],
        "weight_decay": [0.0, 1e-4, 0.1, 1.0],
    }
    return {name: float(rng.choice(values)) for name, values in choices.items()}


# ---------------------------------------------------------------- drawing values

BASIC = ["zero", "subnormal", "smallest normal", "tiny", "moderate", "huge", "largest", "any bits"]
CLASSES = [*BASIC, "mixed", "jumps"]


def reals(rng, name, shape, dtype):
    """Returns finite numbers of one class; the first axis is time."""
    info = jnp.finfo(dtype)
    tiny, top = float(info.tiny), float(info.max)
    low, high = np.log10(tiny), np.log10(top)
    if name == "mixed":
        parts = np.stack([reals(rng, basic, shape, dtype) for basic in BASIC])
        return np.take_along_axis(parts, rng.integers(len(BASIC), size=(1, *shape)), axis=0)[0]
    if name == "any bits":
        word = word_of(info.dtype)
        x = rng.integers(np.iinfo(word).max, size=shape, dtype=word, endpoint=True)
        infinity = np.array(np.inf, info.dtype).view(word)
        return np.where(x & infinity == infinity, 0, x).astype(word).view(info.dtype)
    one_a_step = (shape[0], *[1] * (len(shape) - 1))
    magnitude = {
        "zero": lambda: np.zeros(shape),
        "subnormal": lambda: rng.random(shape) * tiny,
        "smallest normal": lambda: np.full(shape, tiny),
        "tiny": lambda: 10 ** rng.uniform(low, low / 2, shape),
        "moderate": lambda: np.abs(rng.standard_normal(shape)),
        "huge": lambda: 10 ** rng.uniform(high / 2, high, shape),
        "largest": lambda: np.full(shape, top),
        "jumps": lambda: rng.random(shape) * 10 ** rng.uniform(low, high, one_a_step),
    }[name]()
    sign = rng.choice([-1, 1], one_a_step if rng.random() < 0.5 else shape)
    return (sign * np.minimum(magnitude, top)).astype(info.dtype)


def values(rng, name, shape, dtype):
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return reals(rng, name, shape, dtype)
    x = np.zeros(shape, dtype)
    x.real, x.imag = (reals(rng, name, shape, dtype) for _ in range(2))
    return x


def draw_gradients(rng, case, tally):
    """Returns finite gradients for a chunk of steps, whose classes may change now and then."""

    def draw(leaf):
        if not leaf.trained:
            return None
        change = rng.choice([0, 0.15, 1])
        names = [rng.choice(CLASSES)]
        for _ in range(case.steps - 1):
            names.append(rng.choice(CLASSES) if rng.random() < change else names[-1])
        names = np.array(names)
        x = np.zeros((case.steps, *leaf.shape), jnp.dtype(leaf.gradient))
        for name in np.unique(names):
            which = names == name
            x[which] = values(rng, name, (which.sum(), *leaf.shape), leaf.gradient)
            tally["gradients of a leaf, by class of values", str(name)] += int(which.sum())
        return x

    return jax.tree.map(draw, case.tree)


def draw_params(rng, case):
    def draw(leaf):
        any_class = case.wild or (case.remainder and leaf.dtype in LOW)
        name = rng.choice(CLASSES if any_class else ["zero", "tiny", "moderate"])
        return jnp.asarray(values(rng, name, (1, *leaf.shape), leaf.dtype)[0])

    return jax.tree.map(draw, case.tree)


def word_of(dtype):
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def spoil(rng, x, tally):
    """Puts a NaN of any bit pattern, or an infinity, at some of a step's coordinates."""
    x = np.array(x)
    where = np.array(rng.random(x.shape) < 0.3)
    where.flat[rng.integers(x.size)] = True
    part = (np.real(x) if rng.random() < 0.5 else np.imag(x)) if np.iscomplexobj(x) else x
    word = word_of(part.dtype)
    infinity, nan = (int(np.array(y, part.dtype).view(word)) for y in (np.inf, np.nan))
    quiet = nan & ~infinity  # the bit that distinguishes a quiet NaN from a signalling one
    payloads = {"infinity": 0, "NaN": quiet, "signalling NaN": int(rng.integers(1, quiet))}
    payloads["NaN with a payload"] = quiet | payloads["signalling NaN"]
    name = str(rng.choice(list(payloads)))
    sign = int(rng.integers(2)) << (8 * word.itemsize - 1)
    part[where] = np.array(sign | infinity | payloads[name], word).view(part.dtype)
    tally["gradients of a leaf, by class of values", name] += 1
    return x, where


# ---------------------------------------------------------------- running a case


def rate_of(case, i):
    """Returns the learning rate of the i-th leaf at steps t = 1, 2, ..."""
    rate = ROW[case.row].settings | case.settings
    rate = rate.get("learning_rate", -1.0)
    if case.rates == "tree" and ROW[case.row].takes("learning_rate"):
        rate *= 0.5 ** (i % 3)
    if case.rates == "schedule" and ROW[case.row].takes("learning_rate"):
        return lambda t: rate / t
    return lambda t: rate * np.ones_like(t)


def make_inner(case):
    row = ROW[case.row]
    leaves, treedef = jax.tree.flatten(case.tree)
    settings = dict(case.settings)
    if row.takes("mu_dtype"):
        settings |= {"mu_dtype": case.formats[0], "nu_dtype": case.formats[1]}
    if row.takes("learning_rate"):
        rate = (row.settings | settings)["learning_rate"]
        if case.rates == "schedule":
            settings["learning_rate"] = lambda count: rate / (count + 1).astype(float)
        if case.rates == "tree":
            rates = [rate * 0.5 ** (i % 3) for i in range(len(leaves))]
            settings["learning_rate"] = treedef.unflatten(rates)
    if case.masked:
        settings |= row.taken({"mask": treedef.unflatten([decays(i) for i in range(len(leaves))])})
    if case.wrapper == "inject_hyperparams":
        return optax.inject_hyperparams(row.factory)(**row.settings | settings)
    return row.make(**settings)


def decays(i):
    return i % 2 == 0


def make(case):
    """Returns the optimizer of a case."""
    inner = make_inner(case)
    leaves, treedef = jax.tree.flatten(case.tree)
    every_second = treedef.unflatten([decays(i) for i in range(len(leaves))])
    if case.remainder:
        return adam_jax.master_weights(inner, case.remainder)
    if case.wrapper == "average_params":
        return adam_jax.average_params(inner, 0.9)
    if case.wrapper == "apply_if_finite":
        return optax.apply_if_finite(inner, 10**6)
    if case.wrapper == "clip_by_global_norm":
        return optax.chain(optax.clip_by_global_norm(1.0), inner)
    if case.wrapper == "masked":
        return optax.masked(inner, every_second)
    if case.wrapper == "multi_transform":
        labels = jax.tree.map(lambda yes: "ours" if yes else "sgd", every_second)
        return optax.multi_transform({"ours": inner, "sgd": optax.sgd(1e-3)}, labels)
    return inner


def runner(case, optimizer):
    """Returns a function from parameters, state and a chunk of gradients to each step's results.

    Parameters move only if the wrapper needs it: otherwise they could leave their dtype's range.
    """

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        if case.remainder:
            params = jax.tree.map(
                lambda p, u: p if u is None else optax.apply_updates(p, u),
                params,
                updates,
                is_leaf=lambda x: x is None,
            )
        return updates, state, params

    @jax.jit
    def scan(params, state, gradients):
        def body(carry, g):
            params, state = carry
            updates, state, params = step(params, state, g)
            return (params, state), (updates, state, params)

        return jax.lax.scan(body, (params, state), gradients, length=case.steps)[1]

    jitted = jax.jit(step)

    def loop(params, state, gradients):
        one = jitted if case.mode == "jit" else step
        outcome = []
        for i in range(case.steps):
            g = jax.tree.map(lambda x, i=i: x[i], gradients)
            updates, state, params = one(params, state, g)
            outcome.append((updates, state, params))
        return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *outcome)

    return scan if case.mode == "scan" else loop


@contextlib.contextmanager
def mode_of(case):
    """Sets JAX's modes: float64 or not; strict promotion, except where optax mixes dtypes."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", case.x64)
    mixing = case.wrapper != "none" or case.row == "average_params"
    promotion = "standard" if mixing else "strict"
    try:
        with jax.numpy_dtype_promotion(promotion), np.errstate(all="ignore"):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


def run_case(case, tally, *, make=make, wrong=3):
    """Runs and checks one case, and counts it."""
    with mode_of(case):
        rng = np.random.default_rng(case.seed)
        optimizer = make(case)
        params = draw_params(rng, case)
        state = first = optimizer.init(params)
        check_dtypes(case, first)
        run = runner(case, optimizer)
        count = 0
        for _ in range(CHUNKS):
            gradients = draw_gradients(rng, case, tally)
            updates, states, after = jax.device_get(run(params, state, gradients))
            check_structure(case, first, params, updates, states, after)
            check_finite_chunk(case, params, gradients, updates, states, after, count)
            state, params = (jax.tree.map(lambda x: jnp.asarray(x[-1]), y) for y in (states, after))
            count += case.steps
        chunks = CHUNKS + check_spoilt(rng, case, run, first, params, state, count, tally)
        inputs = list(wrong_inputs(rng, case, optimizer, params, state))
        for i in rng.permutation(len(inputs))[:wrong]:
            inputs[i].check()
            tally["wrong inputs, by kind", inputs[i].kind] += 1
    count_case(case, chunks * case.steps, tally)


def count_case(case, updates, tally):
    tally["all", "cases"] += 1
    tally["all", "updates"] += updates
    tally["all", "updates of a leaf"] += updates * sum(leaf.trained for leaf in case.leaves)
    formats = [
        name or "default"
        for name in (case.formats if ROW[case.row].takes("mu_dtype") else (None,) * 2)
    ]
    for table, key in [
        ("mode", case.mode + (", x64" if case.x64 else "")),
        ("optimizer", case.row),
        ("formats of mu, nu", ", ".join(formats)),
        ("wrapper", case.wrapper),
    ]:
        tally[f"updates, by {table}", key] += updates
    for leaf in case.leaves:
        tally["updates of a leaf, by shape", str(leaf.shape)] += updates
        key = f"{leaf.dtype}, {leaf.gradient}"
        tally["updates of a leaf, by dtypes of parameter and gradient", key] += updates


# ---------------------------------------------------------------- checks


def has_moments(x):
    return isinstance(x, optax.ScaleByAdamState | optax.ScaleByAmsgradState)


def moment_states(state):
    return [x for x in jax.tree.leaves(state, is_leaf=has_moments) if has_moments(x)]


def signature(tree, drop=0):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(np.shape(x)[drop:], jnp.result_type(x)) for x in leaves]


def stored_dtype(format, leaf, real):
    """Returns a moment's dtype according to docs/formats.md and docs/numerics.md."""
    wide = WIDE.get(leaf.dtype, "float32")
    if format == "int8" and leaf.shape[-1:] >= (32,) and math.prod(leaf.shape) >= 4096:
        return "uint8" if real else "int8"
    if format == "bfloat16":
        return "bfloat16"
    if format is not None:
        wide = {"complex64": "complex64", "complex128": "complex64"}.get(leaf.dtype, "float32")
    return {"complex64": "float32", "complex128": "float64"}.get(wide, wide) if real else wide


def check_dtypes(case, state):
    if case.wrapper in ("masked", "multi_transform"):
        return  # some leaves have no moments
    (moments,) = moment_states(state)
    formats = case.formats if ROW[case.row].takes("mu_dtype") else (None, None)
    for name in moments._fields[1:]:
        tree = getattr(moments, name)
        scales = units = None
        if isinstance(tree, Int8Moment):
            tree, scales, units = tree
        format = formats[name != "mu"]
        for x, leaf in zip(jax.tree.leaves(tree), case.leaves, strict=True):
            assert x.shape == leaf.shape, (name, x.shape, leaf)
            assert x.dtype == stored_dtype(format, leaf, name != "mu"), (name, x.dtype, leaf)
        if units is not None:
            of_mu = [m.dtype == jnp.int8 for m in jax.tree.leaves(moments.mu)]
            of_nu = [x.dtype == jnp.uint8 for x in jax.tree.leaves(tree)]
            check_rows("scale", scales, case.leaves, of_nu)
            check_rows("unit", units, case.leaves, map(operator.or_, of_mu, of_nu))


def check_rows(name, tree, leaves, coded):
    """Checks that there is one float32 for each row of a leaf with codes."""
    for x, leaf, has_codes in zip(jax.tree.leaves(tree), leaves, coded, strict=True):
        assert x.dtype == jnp.float32, (name, x.dtype)
        assert x.shape == ((*leaf.shape[:-1], 1) if has_codes else ()), (name, x.shape, leaf)


def check_structure(case, first, params, updates, states, after):
    """Checks that trees, shapes and dtypes stay the same, and updates have gradients' dtypes."""
    assert signature(states, 1) == signature(first), "the state changed its structure or dtypes"
    assert signature(after, 1) == signature(params), "a parameter changed its shape or dtype"

    def expected(leaf):
        wide = case.remainder and leaf.dtype in LOW and leaf.trained
        return struct(leaf.shape, "float32" if wide else leaf.gradient)

    expected = jax.tree.map(expected, case.tree)
    assert signature(updates, 1) == signature(expected), "updates of another structure or dtype"


def check_finite_chunk(case, params, gradients, updates, states, after, count):
    """Checks everything that holds for finite gradients."""
    for name, tree in {"state": states, "parameter": after}.items():
        check_finite(name, tree)
    for path, x in optax.tree.get_all_with_path(states, "count"):
        np.testing.assert_array_equal(x, count + 1 + np.arange(case.steps), err_msg=str(path))
    for moments in moment_states(states):
        check_moments(moments)
    check_frozen(case, updates, states, after)
    if case.wrapper in OURS:
        check_steps(case, params, gradients, updates, states, count)
    else:
        check_finite("update", updates)


def check_finite(name, tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            assert np.isfinite(x).all(), f"{name} {jax.tree_util.keystr(path)} is not finite"


def check_frozen(case, updates, states, after):
    """Checks that leaves that never had a gradient have moments and remainders of 0."""
    if any(not leaf.trained for leaf in case.leaves):
        for name, parts in parts_of(case, updates, states, after).items():
            for leaf, x in zip(case.leaves, parts, strict=True):
                if not leaf.trained and name not in ("updates", "params", "average"):
                    assert not np.any(x), f"a None gradient changes {name}"


def check_moments(moments):
    """Checks that nu is not negative, codes are valid, and a maximum over time never shrinks."""
    nu, scales = moments.nu, None
    if isinstance(nu, Int8Moment):
        nu, scales, _ = nu
    nu, scales = jax.tree.leaves(nu), jax.tree.leaves(scales)
    for i, (m, v) in enumerate(zip(jax.tree.leaves(moments.mu), nu, strict=True)):
        m_is_coded, v_is_coded = m.dtype == jnp.int8, v.dtype == jnp.uint8
        byte, v = (
            m.view(np.uint8).astype(int) if m_is_coded else 0,
            v.astype(int) if v_is_coded else v,
        )
        if m_is_coded:
            # Up to 31/32 of the 2^7 values below the sign; nu uses the lowest bit, if it has codes.
            largest = np.max((byte & 0x7F) >> (1 if v_is_coded else 0), initial=0)
            assert largest <= (62 if v_is_coded else 124), "a code that mu does not have"
        if v_is_coded:
            v, n = (2 * v + (byte & 1), 504) if m_is_coded else (v, 252)
            # n - 1 stands for the scale. A nu that equals it up to rounding may get the next code.
            assert np.max(v, initial=0) <= n, "nu beyond its scale"
            assert np.all(scales[i] >= 0), "a scale is negative"
        else:
            assert np.all(v >= 0), "nu is negative"
    for x in jax.tree.leaves(getattr(moments, "nu_max", ())):
        assert np.all(x[1:] >= x[:-1]), "nu_max shrank"


def leaves_of(case, tree):
    """Returns the tree's values at the case's leaves, None included."""
    return jax.tree.structure(case.tree).flatten_up_to(tree)


def check_steps(case, params, gradients, updates, states, count):
    """Checks that each update follows the paper in float64 from the stored moments.

    So no update is NaN, and only those beyond a dtype's largest number may be infinite.
    """
    (moments,) = moment_states(states)
    codes = "int8" in case.formats
    if codes:
        moments = jax.device_get(jax.jit(jax.vmap(adam_jax.convert_state))(moments))
    columns = [leaves_of(case, getattr(moments, name)) for name in moments._fields[1:]]
    trees = (leaves_of(case, tree) for tree in (params, gradients, updates))
    for i, (leaf, p, g, u, *stored) in enumerate(zip(case.leaves, *trees, *columns, strict=True)):
        if leaf.trained:
            check_leaf_steps(case, i, p, g, u, stored, count, codes)


def check_leaf_steps(case, i, p, g, u, stored, count, codes):
    leaf, row = case.leaves[i], ROW[case.row]
    s = {"eps": 1e-8, "b1": 0.9, "b2": 0.999, "eps_root": 0.0, "weight_decay": 0.0}
    s |= row.settings | case.settings
    decay = s["weight_decay"] if not case.masked or decays(i) else 0.0
    bits = [jnp.finfo(x.dtype).bits for x in (*stored, g)]
    arithmetic = jnp.finfo("float64" if max(bits) == 64 else "float32")
    # Twice the error of the direction's own arithmetic in test_adam.py.
    error = 1e-13 if max(bits) == 64 and not codes else 4e-6
    limit = 2.0**511 if min(bits[:-1]) == 64 else 2.0**63
    tiny, top = float(arithmetic.tiny), float(arithmetic.max)
    # Subnormal inputs count as 0. (Those of float16 are not subnormal in float32.)
    inputs = [x.dtype for x in (p, g) if x.dtype != np.float16]
    tiny_in = max([tiny, *(float(jnp.finfo(dtype).tiny) for dtype in inputs)])

    t = (count + 1.0 + np.arange(case.steps)).reshape(-1, *[1] * (u.ndim - 1))
    wide = np.complex128 if np.iscomplexobj(u) else np.float64
    m, g, u, p = (np.asarray(x, wide) for x in (stored[0], g, u, p))
    v = np.asarray(stored[-1], np.float64)
    kept = stored_dtype(case.formats[1] if row.takes("mu_dtype") else None, leaf, real=True)
    if kept != "uint8" and float(jnp.finfo(kept).tiny) > tiny:
        # A nu too small for its dtype counts as the smallest number: mu was not too small.
        v = np.maximum(v, float(jnp.finfo(kept).tiny))
    g = saturated(g, limit)
    unbias = lambda b, t: 1 / -np.expm1(t * np.log(b)) if b else np.ones_like(t)  # noqa: E731
    unbias_m, unbias_next = unbias(s["b1"], t), unbias(s["b1"], t + 1)
    if "adamax" in row.name:
        denominator = np.where(v == 0, np.inf, v)
    else:
        corrected_before = s.get("maximum") == "corrected"
        v_hat = v if corrected_before else v * unbias(s["b2"], t)
        denominator = np.sqrt(np.maximum(v_hat + s["eps_root"], tiny)) + s["eps"]
    terms = [m * unbias_m]
    if "nadam" in row.name:
        terms = [s["b1"] * m * unbias_next, (1 - s["b1"]) * g * unbias_m]
    terms = [term / denominator for term in terms] + [decay * p]
    rate = rate_of(case, i)(t)
    desired = -rate * sum(terms)
    size = sum(map(np.abs, terms))

    dtype = jnp.finfo(leaf.gradient)
    overflow = (size > 0.99 * top) | (np.abs(desired) > 0.99 * float(dtype.max))
    flushed = tiny_in * (2 * unbias_m / denominator + 2)
    smallest = dtype.smallest_subnormal if dtype.dtype == np.float16 else dtype.tiny
    tolerance = np.abs(rate) * (error * size + flushed) + float(smallest)
    tolerance = tolerance + float(dtype.eps) * np.abs(desired)
    wrong = ~(np.abs(u - desired) <= 2 * tolerance) & ~overflow
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"update of leaf {i} at {at}: {u[at]}, not {desired[at]} within {tolerance[at]}; "
            f"{wrong.sum()} of {wrong.size} wrong"
        )


def saturated(g, limit):
    if np.iscomplexobj(g):
        return saturated(g.real, limit) + 1j * saturated(g.imag, limit)
    return np.clip(g, -limit, limit)


# ---------------------------------------------------------------- infinity, NaN and errors


def check_spoilt(rng, case, run, first, params, state, count, tally):
    """Compares a gradient that is not finite at some coordinates with one that is 0 there."""
    candidates = [i for i, leaf in enumerate(case.leaves) if leaf.trained and math.prod(leaf.shape)]
    if not candidates:
        return 0
    gradients = draw_gradients(rng, case, tally)
    chosen = int(rng.choice(candidates))
    leaves, treedef = leaves_of(case, gradients), jax.tree.structure(case.tree)
    spoilt, where = spoil(rng, leaves[chosen][0], tally)
    outcomes = []
    for g in (spoilt, np.where(where, np.zeros_like(spoilt), leaves[chosen][0])):
        leaves[chosen] = np.concatenate([g[None], leaves[chosen][1:]])
        gradients = treedef.unflatten(leaves)
        outcomes.append(jax.device_get(run(params, state, gradients)))
        check_structure(case, first, params, *outcomes[-1])
    check_finite_chunk(case, params, gradients, *outcomes[1], count=count)
    if case.wrapper == "apply_if_finite":
        updates, states, _ = outcomes[0]
        for u in jax.tree.leaves(updates):
            np.testing.assert_array_equal(u[0], np.zeros_like(u[0]))
        first_states = jax.tree.map(lambda x: x[0], states.inner_state)
        jax.tree.map(np.testing.assert_array_equal, first_states, state.inner_state)
        check_finite("state", states.inner_state)
    if case.wrapper in EACH_LEAF_ALONE or case.remainder:
        bad, good = (parts_of(case, *outcome) for outcome in outcomes)
        affected = where
        if stored_dtype(case.formats[1], case.leaves[chosen], real=True) == "uint8":
            affected = np.broadcast_to(where.any(axis=-1, keepdims=True), where.shape)
        for name, leaf_by_leaf in bad.items():
            for i, (x, y) in enumerate(zip(leaf_by_leaf, good[name], strict=True)):
                if x is not None:
                    check_unaffected(f"{name} of leaf {i}", x, y, affected if i == chosen else None)
        if case.wrapper in OURS or case.remainder:
            after = bad["updates"][chosen][1:, where]
            assert not np.isfinite(after).any(), "an infinity or a NaN is hidden"
    return 2


def parts_of(case, updates, states, after):
    """Returns everything of each parameter: its updates and its part of the state."""
    trees = {"updates": updates, "params": after}
    if case.wrapper not in ("masked", "multi_transform"):
        (moments,) = moment_states(states)
        trees |= moments._asdict()
        del trees["count"]
        if isinstance(trees["nu"], Int8Moment):
            trees |= trees["nu"]._asdict()
            del trees["nu"]
        for name in ("average", "remainder"):
            for _, tree in optax.tree.get_all_with_path(states, name):
                trees |= {name: tree} if jax.tree.leaves(tree) else {}
    return {name: leaves_of(case, tree) for name, tree in trees.items()}


def check_unaffected(name, x, y, affected):
    same = ((x == y) | ((x != x) & (y != y))).all(axis=0)
    if affected is not None and same.shape == (*affected.shape[:-1], 1):  # one scale for each row
        affected = affected.any(axis=-1, keepdims=True)
    if affected is None or same.shape != affected.shape:
        affected = np.zeros(same.shape, bool)
    assert same[~affected].all(), f"{name}: more has changed than affected coordinates"


class Wrong(NamedTuple):
    """A mistake of a caller, and a part of the message that it should raise."""

    kind: str
    call: Any
    errors: tuple[type[Exception], ...]
    message: str

    def check(self):
        try:
            self.call()
        except Exception as error:
            if type(error) not in self.errors or self.message not in str(error):
                raise AssertionError(
                    f"wrong input ({self.kind}): expected {self.errors} with {self.message!r}, got "
                    f"{type(error).__name__}: {error}"
                ) from error
        else:
            raise AssertionError(f"wrong input ({self.kind}): no error")


def wrong_inputs(rng, case, optimizer, params, state):
    """Yields wrong inputs to our optimizers, all found while tracing: nothing compiles."""
    trained = [i for i, leaf in enumerate(case.leaves) if leaf.trained]
    if not (case.wrapper in OURS or case.remainder) or not trained:
        return
    row, treedef = ROW[case.row], jax.tree.structure(case.tree)
    i = int(rng.choice(trained))
    leaf = case.leaves[i]
    path, _ = jax.tree_util.tree_flatten_with_path(case.tree)[0][i]
    index = jax.tree_util.keystr(path)
    path = index or "(the only leaf)"
    gradients = jax.tree.map(lambda leaf: struct(leaf.shape, leaf.gradient), case.tree)
    other_shape = (5, *leaf.shape)

    def instead(tree, x):
        leaves = leaves_of(case, tree)
        leaves[i] = x
        return treedef.unflatten(leaves)

    def updating(gradients=gradients, state=state, params=params):
        return lambda: jax.eval_shape(optimizer.update, gradients, state, params)

    def initialising(dtype):
        return lambda: jax.eval_shape(optimizer.init, instead(params, struct(leaf.shape, dtype)))

    # If rates and masks are trees, the error is that these do not fit.
    one_value = case.rates == "number" and not case.masked
    value, type_ = (ValueError,), (TypeError,)
    yield Wrong(
        "gradient of another shape",
        updating(instead(gradients, struct(other_shape, leaf.gradient))),
        value,
        path,
    )
    for dtype in ("int32", "bool", "float32" if leaf.complex else "complex64"):
        yield Wrong(
            f"gradient in {dtype} of a {'complex' if leaf.complex else 'real'} parameter",
            updating(instead(gradients, struct(leaf.shape, dtype))),
            type_,
            path,
        )
    yield Wrong("a leaf less", updating(instead(gradients, ())), value, path if one_value else "")
    more = {"more": struct(leaf.shape, leaf.gradient)}
    yield Wrong(
        "a node more",
        updating(instead(gradients, more)),
        value,
        f"{index}['more']" if one_value else "",
    )
    if row.takes("weight_decay") or case.row == "average_params" or case.wrapper != "none":
        yield Wrong("no parameters", updating(params=None), value, "needs the parameters")
    if row.takes("weight_decay") and case.wrapper == "none" and (decays(i) or not case.masked):
        broadcast = jnp.zeros(other_shape, leaf.dtype)
        yield Wrong(
            "parameter of another shape", updating(params=instead(params, broadcast)), value, path
        )
    for nothing in (None, (), {}, jnp.zeros(3)):
        name = f"{type(nothing).__name__} for a state"
        yield Wrong(name, updating(state=nothing), value + type_, "expected")
    other = jax.eval_shape(optimizer.init, instead(params, struct(other_shape, leaf.dtype)))
    yield Wrong("state of other shapes", updating(state=other), value, path)
    yield Wrong("integer parameter", initialising("int32"), type_, path)
    if case.formats[0] in ("bfloat16", "int8"):
        yield Wrong("complex parameter in few bits", initialising("complex64"), type_, path)
    if row.takes("mu_dtype") and not any(leaf.complex for leaf in case.leaves):
        mu = None if case.formats[0] == "bfloat16" else "bfloat16"
        format = dataclasses.replace(case, formats=(mu, case.formats[1]))
        other = jax.eval_shape(make(format).init, params)
        yield Wrong("state in another format", updating(state=other), value, "convert_state")


def struct(shape, dtype):
    return dtype and jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


# ---------------------------------------------------------------- many cases


def table(tally, name):
    """Returns how many of each were tried, in markdown."""
    rows = sorted((key, n) for (table, key), n in tally.items() if table == name)
    return "\n".join([f"| {name} | |", "|---|---|", *(f"| {key} | {n:,} |" for key, n in rows)])


def main():
    parser = argparse.ArgumentParser(
        description="Tries random optimizers on random input, and prints how much was tried."
    )
    parser.add_argument("--updates", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="in a chunk (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--case", type=int, help="run only this case")
    options = parser.parse_args()
    tally, failed, start = collections.Counter(), [], time.perf_counter()

    def attempt(name, case):
        try:
            run_case(case, tally)
        except Exception:
            failed.append(name)
            print(f"\n{name} failed:\n{case}\n\n{traceback.format_exc()}", flush=True)

    if options.case is not None:
        numbers = [options.case]
    else:
        numbers = itertools.count()
        for i, case in enumerate(REGRESSIONS):
            attempt(f"REGRESSIONS[{i}]", case)
    for number in numbers:
        if tally["all", "updates"] >= options.updates:
            break
        name = f"--seed {options.seed} --steps {options.steps} --case {number}"
        attempt(name, draw_case(options.seed, number, options.steps))
        if number % 50 == 49:
            print(f"{tally['all', 'updates']:,} updates", file=sys.stderr, flush=True)
            jax.clear_caches()  # otherwise the programs would fill the memory
    for name in dict.fromkeys(table for table, _ in tally):
        print(f"\n{table(tally, name)}")
    print(f"\nseed {options.seed}, {(time.perf_counter() - start) / 60:.0f} minutes, ", end="")
    print(f"{len(failed)} failures{''.join(f'; {name}' for name in failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
