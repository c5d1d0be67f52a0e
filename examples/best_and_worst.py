"""A sampling rule of one's own: replay the best and the worst responses to a prompt, half and half.

python -m examples.best_and_worst --replay best_and_worst --on-policy-prob 0.5
"""

import sys

import numpy as np

import buffer
import tba


def best_and_worst(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, of equal rewards any.

    >>> best_and_worst(np.array([0.0, 3.0, 1.0, 2.0]), 2, np.random.default_rng(0)).tolist()
    [0, 1]
    """
    order = np.lexsort((rng.random(len(rewards)), rewards))
    return np.concatenate([order[: k // 2], order[len(order) - (k - k // 2) :]])


buffer.REPLAY["best_and_worst"] = best_and_worst

if __name__ == "__main__":
    sys.exit(tba.main())
