"""Tasks: one module each, with

    Settings                        a subclass of `config.Config`: the task's defaults, and settings of its own
    problems(split, config)         the "train" or "test" problems, a sequence of `Problem`
    reward(response, answer)        the reward of one response's text, a float
    prepare(config)                 optional: makes the model that the default `model` stands for, returns its folder

`countdown.py` is the one to read first, `gsm8k.py` the one to copy.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what `reward` needs to judge a response to it."""

    prompt: str
    answer: Any


def names() -> list[str]:
    """The tasks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        ValueError: there is no such task.
    """
    if name not in names():
        raise ValueError(f"task is {name!r}: it must be one of {', '.join(names())}")
    return importlib.import_module(f"tasks.{name}")


def encode(problems: Sequence[Problem], tokenizer, room: int) -> list[tuple[Problem, np.ndarray]]:
    """Problems with their prompts' tokens, int32 [P]; those whose prompt is longer than `room` tokens are left out.

    Raises:
        ValueError: that leaves none.
    """
    encoded = tokenizer([problem.prompt for problem in problems]).input_ids
    fit = [(p, np.array(t, dtype=np.int32)) for p, t in zip(problems, encoded, strict=True) if 0 < len(t) <= room]
    if not fit:
        raise ValueError(
            f"max_tokens leaves {room} of the model's tokens to a prompt: none of {len(problems)} problems fits"
        )
    if len(fit) < len(problems):
        print(f"{len(problems) - len(fit)} of {len(problems)} prompts are longer than {room} tokens: left out")
    return fit


def accuracy(greedy_N: list[float], rewards_NK: list[list[float]], texts_NK: list[list[str]]) -> dict[str, float]:
    """Figures of an evaluation on N problems; a response is right when its reward is above 0.

    Args:
        greedy_N: reward of the greedy response.
        rewards_NK: rewards of K responses sampled at the training temperature.
        texts_NK: their texts.

    Returns:
        `greedy`, `pass@1` (the mean over the samples), `pass@k` (any of the K is right) and `distinct` (how many
        different right texts there are among the K), each the mean over the problems.

    >>> accuracy([1.0], [[1.0, 1.0, 0.0, 1.0]], [["1+2", "1+2", "1-2", "2+1"]])
    {'greedy': 1.0, 'pass@1': 0.75, 'pass@k': 1.0, 'distinct': 2.0}
    """
    right_NK = np.array(rewards_NK) > 0
    distinct = [
        len({text.strip() for text, ok in zip(texts, right, strict=True) if ok})
        for texts, right in zip(texts_NK, right_NK, strict=True)
    ]
    return {
        "greedy": float(np.mean(np.array(greedy_N) > 0)),
        "pass@1": float(right_NK.mean()),
        "pass@k": float(right_NK.any(axis=1).mean()),
        "distinct": float(np.mean(distinct)),
    }
