"""Adam and its variants in NumPy float64, written from the papers alone, to compare with.

Deliberately naive: the paper's own order of operations, its powers of b, no special cases but the
one the paper's algorithms need (0 / 0 is no step).
"""

import numpy as np


def trajectory(
    gradients,
    params=0.0,
    *,
    learning_rate=-1.0,  # the default turns updates into directions
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    eps_root=0.0,
    weight_decay=0.0,
    nesterov=False,
    amsgrad=None,
    infinity_norm=False,
):
    """Returns the update of each step, shaped like `gradients`, whose first axis is time."""
    g_all = np.asarray(gradients)
    g_all = g_all.astype(np.complex128 if np.iscomplexobj(g_all) else np.float64)
    theta = np.broadcast_to(params, g_all.shape[1:]).astype(g_all.dtype)
    m, v = np.zeros_like(theta), np.zeros(theta.shape)
    v_max = v
    updates = []
    for t, g in enumerate(g_all, start=1):
        m = b1 * m + (1 - b1) * g
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        if infinity_norm:
            v = np.maximum(b2 * v, np.abs(g) + eps)
            denominator = v
        else:
            v = b2 * v + (1 - b2) * np.abs(g) ** 2
            correction = 1 - b2**t
            if amsgrad == "raw":
                v_max = np.maximum(v_max, v)
                v_hat = v_max / correction
            elif amsgrad == "corrected":
                v_max = np.maximum(v_max, v / correction)
                v_hat = v_max
            else:
                v_hat = v / correction
            denominator = np.sqrt(v_hat + eps_root) + eps
        direction = np.where(denominator > 0, m_hat / np.where(denominator > 0, denominator, 1), 0)
        updates.append(-learning_rate * (direction + weight_decay * theta))
        theta = theta + updates[-1]
    return np.array(updates)
