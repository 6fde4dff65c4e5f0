# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "torch>=2.13"]
# ///
"""Records a run of torch's SparseAdam on a table, for tests to compare `row_sparse` with.

    uv run --script tests/golden/make_golden_sparse.py

writes torch_sparse_adam.json next to this script: the peer and its version, the initial table, for
every step the ids whose rows get a gradient and a gradient for each id and, for each setting, the
hyperparameters (read back from the peer and under our names) and the table after every step. All of
it is double precision and reads back exactly.

Each step has equally many ids. Some are equal, and their gradients are summed. Row 0 gets a
gradient at every step, rows 1 to 7 often, 8 at every seventh step, 9 at every sixteenth, 10 at one
step, 11 never. Now and then the gradients of a row sum up to 0, which is a step of that row too.
The columns differ in how large gradients are.

Unlike torch's Adam, SparseAdam adds its eps to the root of v before bias correction: it is the
paper's "eps hat", as in Keras. A test has to convert it at every step.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS, VOCABULARY, WIDTH = 30, 12, 3
SETTINGS = {
    "default": {},
    "short memory": {"lr": 0.02, "betas": (0.5, 0.9)},
    "large eps": {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-2},
}


def noise(prime: int) -> np.ndarray:
    """Returns numbers spread over [0, 1): t sqrt(prime) modulo 1, the same on every machine."""
    return np.arange(1, STEPS + 1) * np.sqrt(prime) % 1


def steps() -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of each step, and a gradient for each id, all of them float32 values."""
    t = np.arange(STEPS)
    ids = np.stack(
        [
            np.zeros(STEPS),
            8 * noise(2),
            8 * noise(3),
            np.where(t % 7 == 3, 8, 3 * noise(5)),
            np.where(t % 16 == 4, 9, np.where(t == 21, 10, 8 * noise(2))),
        ],
        axis=1,
    ).astype(np.int32)
    primes = np.array([7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61])
    gradients = np.stack([2 * noise(prime) - 1 for prime in primes], axis=1)
    gradients = gradients.reshape(STEPS, ids.shape[1], WIDTH)
    gradients += [0.5, 0.0, 0.0]
    gradients *= [1.0, 1e-6, 1e3]
    cancel = (ids[:, 4] == ids[:, 1]) & (t % 4 == 0)
    gradients[cancel, 4] = -gradients[cancel, 1]
    return ids, gradients.astype(np.float32).astype(np.float64)


def run(
    arguments: dict[str, Any], initial: np.ndarray, ids: np.ndarray, gradients: np.ndarray
) -> tuple[dict[str, float], list[Any]]:
    """Returns the hyperparameters in use, and the table after each step."""
    table = torch.nn.Parameter(torch.tensor(initial))
    optimizer = torch.optim.SparseAdam([table], **arguments)
    tables = []
    for named, values in zip(ids, gradients, strict=True):
        indices = torch.tensor(named[None], dtype=torch.int64)
        table.grad = torch.sparse_coo_tensor(
            indices, torch.tensor(values), initial.shape, check_invariants=True
        )
        optimizer.step()
        tables.append(table.tolist())
    used = optimizer.defaults
    b1, b2 = used["betas"]
    return {"learning_rate": used["lr"], "b1": b1, "b2": b2, "eps_hat": used["eps"]}, tables


def main() -> None:
    """Writes the file."""
    torch.set_default_dtype(torch.float64)
    ids, gradients = steps()
    # If a parameter starts at 0, only the updates determine its digits.
    initial = np.arange(VOCABULARY)[:, None] % 4 * np.array([0.5, 0.0, 0.25])
    initial[-1] = 1.0  # the row that never moves
    settings = {}
    for setting, arguments in SETTINGS.items():
        hyperparameters, tables = run(arguments, initial, ids, gradients)
        settings[setting] = {
            "arguments": arguments,
            "hyperparameters": hyperparameters,
            "tables": tables,
        }
    golden = {
        "peer": f"torch {torch.__version__}, SparseAdam",
        "initial": initial.tolist(),
        "ids": ids.tolist(),
        "gradients": gradients.tolist(),
        "settings": settings,
    }
    # One line per row: an innermost list is written again, without line breaks.
    text = re.sub(
        r"\[[^][]+]", lambda x: json.dumps(json.loads(x[0])), json.dumps(golden, indent=0)
    )
    Path(__file__).with_name("torch_sparse_adam.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
