"""The settings: what stores weights, gradients and optimizer state, and which optimizer does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import adam_jax

VARIANTS = ["adam", "adamw", "nadam", "nadamw"]  # they store both moments in every format
WEIGHT_DECAY = 0.01


class Setting(NamedTuple):
    """A way to train."""

    name: str
    make_optimizer: Callable[[str, optax.Schedule], optax.GradientTransformation]  # of a variant
    dtype: str = "float32"  # of weights and gradients
    release: bool = False  # update each block as soon as its gradients are known


def is_kernel(params: optax.Params) -> optax.Params:
    """Returns a tree of booleans: which parameters decay, neither biases nor scales."""

    # By name: biases of stacked layers have two axes too.
    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not any(name in jax.tree_util.keystr(path) for name in ("bias", "scale"))

    return jax.tree_util.tree_map_with_path(decays, params)


def decay(variant: str) -> dict[str, Any]:
    """Returns the arguments that a variant with weight decay has in addition."""
    return {"weight_decay": WEIGHT_DECAY, "mask": is_kernel} if variant.endswith("w") else {}


def ours(moments: str, remainder: str | None = None) -> Callable[..., Any]:
    """Makes optimizers of adam_jax with both moments in one format."""

    def make(variant: str, rate: optax.Schedule) -> optax.GradientTransformation:
        adam = getattr(adam_jax, variant)
        optimizer = optax.chain(
            adam_jax.clip_by_global_norm(1.0),  # unlike optax's it works with gradient release
            adam(rate, mu_dtype=moments, nu_dtype=moments, **decay(variant)),
        )
        return adam_jax.master_weights(optimizer, remainder) if remainder else optimizer

    return make


def with_optax(variant: str, rate: optax.Schedule) -> optax.GradientTransformation:
    """Makes the same optimizer from nothing but optax."""
    adam = getattr(optax, variant)
    return optax.chain(optax.clip_by_global_norm(1.0), adam(rate, **decay(variant)))


FLOAT32 = "float32"
ALL_BFLOAT16 = "optax.adamw, all bfloat16"
SETTINGS = {
    setting.name: setting
    for setting in [
        Setting(FLOAT32, ours("float32")),
        Setting("float32, released", ours("float32"), release=True),
        Setting("bfloat16 moments", ours("bfloat16")),
        Setting("int8 moments", ours("int8")),
        Setting(ALL_BFLOAT16, with_optax, dtype="bfloat16"),
        Setting("7 bytes", ours("int8", "int8"), dtype="bfloat16"),
        Setting("5 bytes", ours("int8", "int8"), dtype="bfloat16", release=True),
    ]
}
DEFAULT = [FLOAT32, ALL_BFLOAT16, "7 bytes", "5 bytes"]
