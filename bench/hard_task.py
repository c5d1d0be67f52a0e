"""A few hard prompts, searched over and over: what bench.sweep's search is about.

64 problems of 4 numbers whose only solution subtracts three of them: the embedded model is right about 6 times in a
thousand. They are what is trained on and what is examined, as the one instruction of the paper's red-teaming is.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from tasks import Problem, countdown

PROMPTS = 64


class Task(countdown.Task):
    """Countdown on the same 64 hard problems for training and testing."""

    @dataclass(frozen=True)
    class Settings(countdown.Task.Settings):
        """Post-train a small model on 64 hard Countdown problems."""

        numbers: Literal[3, 4] = 4

    def problems(self, split: str) -> list[Problem]:
        return [problem for problem in super().problems("train") if hard(**problem.answer)][:PROMPTS]


def hard(numbers: list[int], target: int) -> bool:
    """Whether one number minus the three others is the only sum of them, each with either sign, that is the target.

    >>> hard([40, 10, 5, 2], 23), hard([40, 10, 5, 2], 27), hard([40, 5, 5, 2], 28)
    (True, False, True)
    """
    signs = [s for s in itertools.product((1, -1), repeat=4) if sum(map(int.__mul__, s, numbers)) == target]
    return len(signs) == 1 and signs[0].count(-1) == 3
