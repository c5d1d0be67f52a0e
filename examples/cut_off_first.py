"""Evict the responses that were cut off at --max-tokens first: they cost the most to train on, and few are rewarded.

python tba.py --evict examples/cut_off_first.py:cut_off_first --capacity 50
"""

from buffer import Response


def cut_off_first(response: Response) -> bool:
    """The key of a response: the smallest leaves first, the oldest of equals.

    >>> import numpy as np
    >>> cut_off_first(Response(np.array([5]), finished=False)) < cut_off_first(Response(np.array([5]), finished=True))
    True
    """
    return response.finished
