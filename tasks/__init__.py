"""Tasks: what is asked, and what an answer is worth. One file each, with a class `Task` in it.

    class Task(tasks.Task):
        Settings                        a subclass of `config.Config`: the task's defaults, and settings of its own
        problems(split)                 the "train" or "test" problems
        reward(problem, responses)      the rewards of the responses to one problem; may be `async`

That is all that is needed. The other methods of the base class have a default each. `gsm8k.py` is the one to read
first, and the README has a whole task to copy; `--task path/to/file.py` trains on yours.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from searcher import Response


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what `reward` needs to judge a response to it."""

    prompt: str | list[dict[str, str]]  # text as it is, or the messages of a chat for the model's chat template
    answer: Any = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A test problem with the policy's responses, each with its `reward` (nan where the reward failed)."""

    problem: Problem
    prompt: np.ndarray  # int32 [P]
    greedy: Response
    samples: list[Response]  # drawn at the training temperature


class Task:
    """What the policy is trained on. Made once a run, before any model is loaded.

    Args:
        config: the settings, an instance of the task's `Settings`.
        tokenizer: the policy's.
    """

    Settings: type[Config] = Config
    best = "pass@1"  # the figure of `evaluate` that tells the best checkpoint, the higher the better
    evaluation_logprobs = False  # whether `evaluate` reads the samples' `logprobs`

    def __init__(self, config: Config, tokenizer):
        self.config: Any = config  # of the task's own `Settings`
        self.tokenizer = tokenizer

    @classmethod
    def model(cls, config: Any) -> str:
        """The folder or hub id of the model that `config.model` stands for."""
        return config.model

    def problems(self, split: str) -> Sequence[Problem]:
        """The "train" or "test" problems.

        Raises:
            ValueError: they are not there or not as they must be; says what and where.
        """
        raise NotImplementedError

    async def start(self, devices: Sequence[str], cores: set[int], log: Path) -> None:
        """Load what the reward needs beside the engines, which have started; what it prints may go to the file `log`.

        Args:
            devices: that search.
            cores: the CPU cores that search.
            log: a file.
        """

    def reward(self, problem: Problem, responses: list[Response]) -> Sequence[float] | Awaitable[Sequence[float]]:
        """The rewards of the responses to one problem, in their order.

        A plain function runs in a thread; an `async` one may wait for others. Either may take its time, since search
        goes on. What raises, hangs or is nan costs those responses and nothing else.
        """
        raise NotImplementedError

    async def embed(self, responses: list[Response]) -> np.ndarray:
        """Embeddings of length 1 [N, D]: what `--near-duplicates cosine` compares."""
        raise NotImplementedError

    def evaluate(self, answers: list[Answered]) -> dict[str, float] | Awaitable[dict[str, float]]:
        """Figures of an evaluation; may be `async`."""
        return accuracy(answers)

    def end(self) -> None:
        """Give back what `start` took."""


def accuracy(answers: list[Answered]) -> dict[str, float]:
    """Figures of an evaluation in which a response is right when its reward is above 0 (so one whose reward failed is
    not), each the mean over problems.

    Returns:
        `greedy`; `pass@1`, the mean over the K samples; `pass@k`, any of the K is right; `distinct`, how many different
        right texts there are among the K; `truncated`, the share of samples that were cut off; and, where rewards are
        other than 0 and 1, `reward`, their mean over the samples.

    >>> def sample(text, reward):
    ...     return Response(np.array([1]), True, None, text=text, reward=reward)
    >>> four = [sample("1+2", 1.0), sample("1+2 ", 1.0), sample("1-2", 0.0), sample("2+1", 1.0)]
    >>> accuracy([Answered(Problem("3:"), np.array([1]), four[0], four)])
    {'greedy': 1.0, 'pass@1': 0.75, 'pass@k': 1.0, 'distinct': 2.0, 'truncated': 0.0}
    """
    right_NK = np.array([[sample.reward > 0 for sample in each.samples] for each in answers])
    distinct = [len({sample.text.strip() for sample in each.samples if sample.reward > 0}) for each in answers]
    rewards = np.array([sample.reward for each in answers for sample in each.samples])
    rewards = rewards[~np.isnan(rewards)]  # a reward that failed
    graded = {"reward": float(rewards.mean())} if set(rewards) - {0.0, 1.0} else {}
    return {
        "greedy": float(np.mean([each.greedy.reward > 0 for each in answers])),
        "pass@1": float(right_NK.mean()),
        "pass@k": float(right_NK.any(axis=1).mean()),
        "distinct": float(np.mean(distinct)),
        "truncated": float(np.mean([not sample.finished for each in answers for sample in each.samples])),
    } | graded


def names() -> list[str]:
    """The tasks that come with the project."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> type[Task]:
    """The class of a task, by its name or by the path of its file.

    Raises:
        ValueError: there is no such task, or the file is none.
    """
    if name in names():
        return importlib.import_module(f"tasks.{name}").Task
    if not name.endswith(".py") or not Path(name).is_file():
        known = ", ".join(names())
        raise ValueError(f"task is {name!r}: it must be one of {known}, or the path of a Python file with a task")
    spec = importlib.util.spec_from_file_location(f"task_{Path(name).stem}", name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"task is {name!r}: it cannot be imported ({type(error).__name__}: {error})") from error
    task = getattr(module, "Task", None)
    if not (isinstance(task, type) and issubclass(task, Task) and task is not Task):
        raise ValueError(f"task is {name!r}: it must have a class Task, made from tasks.Task")
    return task
