"""Countdown, whose reward fails now and then: see soak.py."""

import math
import random
import time

from tasks import countdown


class Task(countdown.Task):
    def reward(self, problem, responses):
        right = super().reward(problem, responses)
        match random.randrange(2000):
            case 0:
                raise RuntimeError("the reward broke")
            case 1:
                time.sleep(3)
            case 2:
                return [math.nan, *right[1:]]
            case 3:
                return right[:-1]
            case 4:
                return [1e38, *right[1:]]  # over beta this is infinite in fp32
        return right
