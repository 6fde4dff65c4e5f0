# /// script
# requires-python = ">=3.11"
# dependencies = ["keras>=3.15", "numpy>=2.0", "torch>=2.13"]
# ///
"""Records runs of torch's and Keras' optimizers, for tests/contracts/test_golden.py.

    uv run --script tests/golden/make_golden.py

writes one JSON file per optimizer next to this script. A file has the peer and its version, the
initial parameters, the gradients of every step and, for each setting, the hyperparameters (read
back from the peer and under our names) and the parameters after every step. All of it is double
precision and reads back exactly. The gradients are given rather than computed from the parameters,
so an error at one step cannot hide in the next.

Settings make two peers do the same as our function of the same name:

- torch's NAdam warms b1 up by the factor 1 - 0.96^(t momentum_decay) / 2. With a momentum_decay
  of 1e9 the power underflows to 0 and b1 is constant, as it is here and in optax.
- Keras' epsilon is the paper's "eps hat", which the test converts into our eps at every step.
  Its Nadam (a warm-up that cannot be turned off) and Adamax (epsilon outside the maximum) are
  other algorithms and are not recorded.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ["KERAS_BACKEND"] = "torch"  # read once, by the import
import keras

STEPS = 50


def noise(prime: int) -> np.ndarray:
    """Returns numbers spread over (-1, 1): t sqrt(prime) modulo 1, the same on every machine."""
    return 2 * (np.arange(1, STEPS + 1) * np.sqrt(prime) % 1) - 1


def coordinates() -> dict[str, tuple[float, np.ndarray]]:
    """Returns each coordinate's initial parameter and gradients, all of them float32 values.

    If a parameter starts at 0, only the updates determine its digits.
    """
    t = np.arange(STEPS)
    rows = {
        "noisy": (0.5, noise(2) + 0.5),
        "zero": (-1.0, np.zeros(STEPS)),
        "sparse": (0.25, np.where(t % 16 == 4, noise(3), 0)),
        "alternating": (0.0, np.where(t % 2 == 0, 1.0, -1.0)),
        "huge": (0.125, noise(5) * 1e6),
        "tiny": (0.0, noise(7) * 1e-6),
        "below eps": (0.0, (noise(11) + 0.5) * 1e-10),
        "shrinking": (0.0, np.ldexp(noise(13), -t // 2)),
    }
    return {name: (x, g.astype(np.float32).astype(np.float64)) for name, (x, g) in rows.items()}


def run_torch(
    make: Any, arguments: dict[str, Any], initial: np.ndarray, gradients: np.ndarray
) -> tuple[dict[str, float], list[list[float]]]:
    """Returns the hyperparameters in use, and the parameters after each step."""
    x = torch.nn.Parameter(torch.tensor(initial))
    optimizer = make([x], **arguments)
    params = []
    for gradient in gradients:
        x.grad = torch.tensor(gradient)
        optimizer.step()
        params.append(x.tolist())
    used = optimizer.defaults
    b1, b2 = used["betas"]
    hyperparameters = {"learning_rate": used["lr"], "b1": b1, "b2": b2, "eps": used["eps"]}
    if used["weight_decay"]:
        hyperparameters["weight_decay"] = used["weight_decay"]
    return hyperparameters, params


def run_keras(
    make: Any, arguments: dict[str, Any], initial: np.ndarray, gradients: np.ndarray
) -> tuple[dict[str, float], list[list[float]]]:
    """Does as `run_torch`; the hyperparameter `eps_hat` is Keras' epsilon."""
    with keras.device("cpu"):
        x = keras.Variable(initial)
        optimizer = make(**arguments)
        params = []
        for gradient in gradients:
            optimizer.apply([torch.tensor(gradient)], [x])
            params.append(x.numpy().tolist())
    hyperparameters = {
        "learning_rate": optimizer.learning_rate.numpy().item(),
        "b1": optimizer.beta_1,
        "b2": optimizer.beta_2,
        "eps_hat": optimizer.epsilon,
    }
    if optimizer.weight_decay:
        hyperparameters["weight_decay"] = optimizer.weight_decay
    return hyperparameters, params


# File name: peer, arguments of every setting, and further arguments of the setting "other". Between
# them the others have b1 and b2 on either side of 1/2 and an eps of any weight.
TORCH = {
    "torch_adam": (
        torch.optim.Adam,
        {},
        {"lr": 0.02, "betas": (0.3, 0.4), "eps": 1e-6},
    ),
    "torch_adamw": (
        torch.optim.AdamW,
        {},
        {"lr": 0.03, "betas": (0.95, 0.98), "eps": 1e-3, "weight_decay": 0.5},
    ),
    "torch_nadam": (
        torch.optim.NAdam,
        {"momentum_decay": 1e9},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5},
    ),
    "torch_adamax": (
        torch.optim.Adamax,
        {},
        {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4},
    ),
    "torch_amsgrad": (
        torch.optim.Adam,
        {"amsgrad": True},
        {"lr": 0.05, "betas": (0.0, 0.9), "eps": 1e-10},
    ),
}
KERAS = {
    "keras_adam": (
        keras.optimizers.Adam,
        {},
        {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3},
    ),
    "keras_adamw": (
        keras.optimizers.AdamW,
        {},
        {"learning_rate": 0.03, "beta_1": 0.5, "beta_2": 0.9, "weight_decay": 0.1},
    ),
    "keras_amsgrad": (
        keras.optimizers.Adam,
        {"amsgrad": True},
        {"learning_rate": 0.01, "beta_1": 0.6, "beta_2": 0.99, "epsilon": 1e-5},
    ),
}


def main() -> None:
    """Writes every file."""
    # With the default, NAdam's product of b1 would be float32 in torch, and all numbers in Keras.
    torch.set_default_dtype(torch.float64)
    keras.config.set_floatx("float64")

    initial, gradients = (np.array(x).T for x in zip(*coordinates().values(), strict=True))
    for peers, run, package in [(TORCH, run_torch, torch), (KERAS, run_keras, keras)]:
        for name, (make, needed, other) in peers.items():
            settings = {}
            for setting, arguments in [("default", needed), ("other", needed | other)]:
                hyperparameters, params = run(make, arguments, initial, gradients)
                settings[setting] = {
                    "arguments": arguments,
                    "hyperparameters": hyperparameters,
                    "params": params,
                }
            golden = {
                "peer": f"{package.__name__} {package.__version__}, {make.__name__}",
                "coordinates": list(coordinates()),
                "initial": initial.tolist(),
                "gradients": gradients.tolist(),
                "settings": settings,
            }
            # One line per step: an innermost list is written again, without line breaks.
            text = re.sub(
                r"\[[^][]+]", lambda x: json.dumps(json.loads(x[0])), json.dumps(golden, indent=1)
            )
            (Path(__file__).parent / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
