"""Replay the best and the worst responses to a prompt, half and half.

python tba.py --replay examples/best_and_worst.py:best_and_worst

With prompts that are few and hard, more search then gains at as many updates (docs/measurements.md): there with
--on-policy-prob 0, so that a batch is replay alone, and --evict lowest_reward.
"""

import numpy as np


def best_and_worst(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices; where rewards are equal, any.

    >>> best_and_worst(np.array([0.0, 3.0, 1.0, 2.0]), 2, np.random.default_rng(0)).tolist()
    [0, 1]
    """
    order = np.lexsort((rng.random(len(rewards)), rewards))
    return np.concatenate([order[: k // 2], order[len(order) - (k - k // 2) :]])
