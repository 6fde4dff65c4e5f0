"""The table of optimizers. Contract tests run over its rows, those marked `covering` over some.

To add an optimizer, add a row: how to make it, and what it should do according to the paper.
Contracts about storage run over `STORED_ROWS`, which adds `master_weights`.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax
import pytest
import reference

import adam_jax

# XLA contracts a product and a sum into one rounding in some programs and not in others. With
# powers of two it makes no difference, because the product is exact anyway.
EXACT: dict[str, Any] = {
    "learning_rate": 2**-10,
    "b1": 0.5,
    "b2": 1 - 2**-10,
    "weight_decay": 2**-7,
}
INT8: dict[str, Any] = {"mu_dtype": "int8", "nu_dtype": "int8"}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    reference: Callable[..., Any]  # see reference.trajectory
    peer: Callable[..., optax.GradientTransformation] | None = None  # optax's, with the same state
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    mu_format: str | None = None  # as passed to the factory
    nu_format: str | None = None
    # The cost of storage: how far an update may be from the reference after a few steps on a
    # small leaf, relative to the leaf's largest entry. About twice the measured distance.
    storage_error: float = 0.0
    param_dtype: str = "float32"  # of the parameters that the optimizer is made for

    def __post_init__(self):
        if self.takes("learning_rate"):
            self.settings.setdefault("learning_rate", 0.01)

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.factory).parameters

    def make(self, **overrides) -> Any:
        """Returns the optimizer with the overrides it accepts; without any, always the same one."""
        if not overrides:
            return self._made
        return self.factory(**self.settings | self.taken(overrides))

    @functools.cached_property
    def _made(self):
        return self.factory(**self.settings)

    def make_peer(self):
        assert self.peer is not None
        return self.peer(**{k: v for k, v in self.settings.items() if k != "maximum"})

    def updates(self, gradients, params=0.0, **overrides):
        """Returns the reference's updates in float64 for gradients of shape (time, ...)."""
        return self.reference(gradients, params, **self.settings | self.taken(overrides))

    @property
    def algorithm(self):
        """The name without marks of scaling alone (`scale_by_`) and of weight decay (`w`)."""
        return self.name.removeprefix("scale_by_").removesuffix("w")

    @property
    def traits(self):
        """The traits a covering set includes: each algorithm in float32, each storage format."""
        found = {(name, self.takes(name)) for name in ("learning_rate", "weight_decay")}
        found |= {("mu", self.mu_format or "float32"), ("nu", self.nu_format or "float32")}
        return found if self.stochastic else found | {("algorithm", self.algorithm)}

    @property
    def stochastic(self):
        """Whether stochastic rounding makes the stored state no smooth function."""
        return self.storage_error > 0

    def taken(self, overrides):
        return {name: value for name, value in overrides.items() if self.takes(name)}


def _averaged_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    return adam_jax.average_params(adam_jax.adam(learning_rate, b1, b2, eps), 0.9)


def _reference(**variant):
    def run(gradients, params, maximum=None, **settings):
        amsgrad = {"amsgrad": maximum} if maximum else {}
        return reference.trajectory(gradients, params, **settings, **variant, **amsgrad)

    return run


_adam = _reference()
_nadam = _reference(nesterov=True)
_adamax = _reference(infinity_norm=True)
_partial = functools.partial


def _stored(factory, mu_dtype, nu_dtype):
    return functools.partial(factory, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


def _stored_row(name, row, mu_format, nu_format, storage_error):
    return dataclasses.replace(
        row,
        name=name,
        factory=_stored(row.factory, mu_format, nu_format),
        peer=None,
        mu_format=mu_format,
        nu_format=nu_format,
        storage_error=storage_error,
    )


_FLOAT_ROWS = [
    Row("adam", adam_jax.adam, _adam, optax.adam),
    Row("adamw", adam_jax.adamw, _adam, optax.adamw, {"weight_decay": 0.1}),
    Row("nadam", adam_jax.nadam, _nadam, optax.nadam),
    Row("nadamw", adam_jax.nadamw, _nadam, optax.nadamw, {"weight_decay": 0.1}),
    Row("amsgrad", adam_jax.amsgrad, _adam, None, {"maximum": "raw"}),
    Row("amsgrad-optax", adam_jax.amsgrad, _adam, optax.amsgrad, {"maximum": "corrected"}),
    Row("adamax", adam_jax.adamax, _adamax, optax.adamax),
    Row("adamaxw", adam_jax.adamaxw, _adamax, optax.adamaxw, {"weight_decay": 0.1}),
    Row("scale_by_adam", adam_jax.scale_by_adam, _adam, optax.scale_by_adam),
    Row(
        "scale_by_nadam",
        _partial(adam_jax.scale_by_adam, nesterov=True),
        _nadam,
        _partial(optax.scale_by_adam, nesterov=True),
    ),
    Row("scale_by_amsgrad", adam_jax.scale_by_amsgrad, _adam, None, {"maximum": "raw"}),
    Row("scale_by_adamax", adam_jax.scale_by_adamax, _adamax, optax.scale_by_adamax),
    Row("average_params", _averaged_adam, _adam),
]

_BY_NAME = {row.name: row for row in _FLOAT_ROWS}
ROWS = [
    *_FLOAT_ROWS,
    _stored_row("adam-bfloat16", _BY_NAME["adam"], "bfloat16", "bfloat16", 0.05),
    _stored_row("adamw-int8", _BY_NAME["adamw"], "int8", "int8", 0.3),
    _stored_row("nadam-int8-float32", _BY_NAME["nadam"], "int8", "float32", 0.3),
    _stored_row("amsgrad-int8-bfloat16", _BY_NAME["amsgrad"], "int8", "bfloat16", 0.3),
    _stored_row("adamax-bfloat16", _BY_NAME["adamax"], "bfloat16", "bfloat16", 0.05),
]


def seven_bytes(learning_rate: Any = 1e-2, remainder="int8", **settings):
    """Returns the setting `7 bytes`: bfloat16 weights, int8 remainder, int8 moments."""
    return adam_jax.master_weights(adam_jax.adamw(learning_rate, **INT8, **settings), remainder)


def _weights_row(remainder, moments):
    def factory(learning_rate, b1=0.9, b2=0.999, weight_decay=1e-4):
        formats = {"mu_dtype": moments, "nu_dtype": moments}
        inner = adam_jax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, **formats)
        return adam_jax.master_weights(inner, remainder)

    exact = moments == "float32" and remainder in ("int16", "float32")  # float32, in two parts
    return Row(
        f"master_weights-{remainder}-{moments}",
        factory,
        _adam,
        None,
        {"weight_decay": 0.1},
        mu_format=moments,
        nu_format=moments,
        storage_error=0.0 if exact else 0.3,
        param_dtype="bfloat16",
    )


STORED_ROWS = ROWS + [
    _weights_row(remainder, moments)
    for remainder in ("none", "int8", "int16", "float32")
    for moments in ("float32", "bfloat16", "int8")
]
# Every type of state, every format and every remainder. Rows that differ in arithmetic alone run
# with --full.
_LAYOUTS = [
    "adamw",
    "adamax",
    "average_params",
    "adam-bfloat16",
    "adamw-int8",
    "nadam-int8-float32",
    "amsgrad-int8-bfloat16",
    "master_weights-none-float32",
    "master_weights-int8-int8",
    "master_weights-int16-bfloat16",
    "master_weights-float32-int8",
]
LAYOUT_ROWS = [row for row in STORED_ROWS if row.name in _LAYOUTS]


def each(rows):
    """Parametrizes a test over rows, by their names."""
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


def _layout(row):
    """Returns a row as a parameter. Its tests share a worker, and with it the compiled programs."""
    marks = [pytest.mark.xdist_group(row.name)]
    return pytest.param(
        row, id=row.name, marks=marks if row in LAYOUT_ROWS else [*marks, pytest.mark.full]
    )


each_row = each(ROWS)
each_row_with_peer = each([row for row in ROWS if row.peer])
# For tests of where and how state is stored.
each_layout = pytest.mark.parametrize("row", list(map(_layout, STORED_ROWS)))
