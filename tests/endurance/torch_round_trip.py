"""Trains in torch, then here, then in torch again, and compares with a run that stays in torch.

    uv run --with torch tests/endurance/torch_round_trip.py

test_torch.py works without torch, with recorded numbers; this script runs torch. For each of
torch's optimizers, with parameter groups, the network and the digits of golden/, it makes 20 steps
in torch, 20 in Flax and 20 in torch. The table shows how far weights and moments end from 60 steps
in torch, in double precision, relative to the largest of each array. Then moments of a network in
bfloat16 make a round trip, in which no bit may change: bfloat16 fits into float32.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

# pytest finds modules in these folders by itself, a script does not.
sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "golden", "helpers"))
import make_torch_training as there
import test_torch as here

import adam_jax

LIMIT = 1e-12  # as in test_torch.py


def train(network, optimizer, steps):
    digits = here.golden()
    images = torch.tensor(digits["images"][:, None] / (16 * 255))
    labels = torch.tensor(digits["labels"].astype(np.int64))
    for step in steps:
        batch = slice(start := step * there.BATCH % len(images), start + there.BATCH)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()


def in_order(network, optimizer):
    """Returns the parameters by name, in the optimizer's order."""
    names = {param: name for name, param in network.named_parameters()}
    return {names[p]: p.detach() for group in optimizer.param_groups for p in group["params"]}


def difference(actual, desired):
    return float((actual - desired).abs().max() / desired.abs().max())


def round_trip(name):
    """Returns how far weights and moments are from a run that never left torch."""
    make, groups, arguments = there.OPTIMIZERS[name]
    stays = there.make_network()
    optimizer = make(groups(stays), **arguments)
    train(stays, optimizer, range(20))

    torch_state, weights = optimizer.state_dict(), in_order(stays, optimizer)
    params, state, _ = here.continued(name, torch_state, weights)

    moves = there.make_network()
    returned = make(groups(moves), **arguments)
    fresh = in_order(moves, returned)
    returned.load_state_dict(adam_jax.to_torch(state, returned.state_dict(), fresh, here.to_params))
    like = {name: jnp.zeros(w.shape) for name, w in weights.items()}
    (back,) = jax.linear_transpose(here.to_params, like)(params)
    moves.load_state_dict({name: torch.tensor(np.array(w)) for name, w in back.items()})

    train(stays, optimizer, range(20, 60))
    train(moves, returned, range(40, 60))
    of_weights = [difference(fresh[name], weights[name]) for name in weights]
    of_moments = [
        difference(entry[field], optimizer.state_dict()["state"][key][field])
        for key, entry in returned.state_dict()["state"].items()
        for field in entry
    ]
    return max(of_weights), max(of_moments)


def bits_that_change(name):
    """Counts changed bits in the moments of a bfloat16 network, after a round trip."""
    make, groups, arguments = there.OPTIMIZERS[name]
    network = there.make_network().bfloat16()
    optimizer = make(groups(network), **arguments)
    for param in network.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    weights, torch_state = in_order(network, optimizer), optimizer.state_dict()
    params = here.to_params({k: jnp.asarray(p.float().numpy()) for k, p in weights.items()})
    ours = here.optimizer_like(name, torch_state["param_groups"]).init(params)
    state = adam_jax.from_torch(torch_state, weights, here.to_params, ours)
    copy = make(groups(network), **arguments)
    copy.load_state_dict(adam_jax.to_torch(state, copy.state_dict(), weights, here.to_params))
    changed = 0
    for key, entry in copy.state_dict()["state"].items():
        # load_state_dict itself rounds NAdam's product of b1 to bfloat16.
        for field in entry.keys() - {"mu_product"}:
            x, desired = entry[field], torch_state["state"][key][field]
            assert field == "step" or x.dtype == desired.dtype == torch.bfloat16
            changed += int((x != desired).sum())
    return changed


def main():
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    print(f"torch {torch.__version__}\n")
    print("| | weights | moments | changed in bfloat16 |\n|---|---|---|---|")
    failed = False
    for name in here.NAMES:
        weights, moments = round_trip(name)
        changed = bits_that_change(name)
        failed |= not (weights < LIMIT and moments < LIMIT and changed == 0)
        print(f"| {name} | {weights:.1e} | {moments:.1e} | {changed} |")
    if failed:
        sys.exit(f"More than {LIMIT:g}.")


if __name__ == "__main__":
    main()
