"""The table of optimizers. Every contract test runs over all of its rows.

A new optimizer is one more row: how to make it, and what it should do according to the paper.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax
import reference

import adam_jax


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    reference: Callable[..., Any]  # see reference.trajectory
    peer: Callable[..., optax.GradientTransformation] | None = None  # optax's, of equal state
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    mu_format: str | None = None  # as asked of the factory
    nu_format: str | None = None
    # What storage costs: how far an update may be from the reference after a few steps on a small
    # leaf, relative to the leaf's largest. Measured, and about doubled.
    storage_error: float = 0.0

    def __post_init__(self):
        if self.takes("learning_rate"):
            self.settings.setdefault("learning_rate", 0.01)

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.factory).parameters

    def make(self, **overrides):
        """The optimizer, with those of the overrides that it takes."""
        return self.factory(**self.settings | self.taken(overrides))

    def make_peer(self):
        assert self.peer is not None
        return self.peer(**{k: v for k, v in self.settings.items() if k != "maximum"})

    def updates(self, gradients, params=0.0, **overrides):
        """The updates that the reference makes in float64 on gradients of shape (time, ...)."""
        return self.reference(gradients, params, **self.settings | self.taken(overrides))

    @property
    def differentiable(self):
        """Whether what is stored is a smooth function of the gradients."""
        return not self.storage_error

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
