"""Stands in for the parts of torch that the documentation's snippets use, where it is missing."""

from types import SimpleNamespace
from unittest import mock

import numpy as np


class Tensor(np.ndarray):
    """An array with the methods of torch's tensors that `from_torch` and `to_torch` need."""

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return np.asarray(self)

    def element_size(self):
        return self.itemsize

    def new_tensor(self, x):
        return np.asarray(x, self.dtype).view(Tensor)

    def new_zeros(self, shape, device):
        return np.zeros(shape, self.dtype).view(Tensor)

    def float(self):
        return self.astype(np.float32)


def stand_in_for_torch(shapes):
    """Returns a module with one network of these weight shapes and an AdamW after 7 steps.

    All else that a snippet does with the network, such as a forward pass, has no effect.
    """
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=shape).astype(np.float32).view(Tensor)
        for name, shape in shapes.items()
    }
    group = {"params": [*range(len(weights))], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    state = {
        "state": {
            key: {"step": np.float32(7), "exp_avg": w + 1, "exp_avg_sq": w**2}
            for key, w in enumerate(weights.values())
        },
        "param_groups": [group | {"weight_decay": 1e-2, "amsgrad": False}],
    }
    model = mock.MagicMock(
        named_parameters=weights.items,
        load_state_dict=lambda arrays, strict=True: weights.update(arrays),
    )
    optimizer = SimpleNamespace(
        param_groups=state["param_groups"],
        state_dict=lambda: state,
        load_state_dict=state.update,
        step=lambda: None,
    )
    return SimpleNamespace(
        nn=SimpleNamespace(Linear=lambda *sizes: model),
        ones=lambda *shape: np.ones(shape, np.float32).view(Tensor),
        optim=SimpleNamespace(AdamW=lambda *params, **hyperparameters: optimizer),
        tensor=lambda x: x.view(Tensor),
    )
