"""Tasks: problems, and the rewards of responses to them. One file each, with a class `Task` in it.

    class Task(tasks.Task):
        Settings                        a subclass of `config.Config`: the task's defaults, and settings of its own
        problems(split)                 the "train" or "test" problems
        reward(problem, responses)      the rewards of the responses to one problem; may be `async`

That is all that is needed. The other methods of the base class have a default each. `gsm8k.py` is the one to read
first, and the README has a whole task to copy; `--task path/to/file.py` trains on yours.
"""

import contextlib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from buffer import Response
from config import Config


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what `reward` needs to score a response to it."""

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
    best = "pass@1"  # the figure of `evaluate` by which the best checkpoint is chosen, the higher the better
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

    def reward(self, problem: Problem, responses: list[Response]) -> Sequence[float] | Awaitable[Sequence[float]]:
        """The rewards of the responses to one problem, in their order.

        A plain function runs in a thread; an `async` one may wait for others. Either may take its time, since search
        goes on. What raises, hangs or is nan costs those responses and nothing else.
        """
        raise NotImplementedError

    async def embed(self, responses: list[Response]) -> np.ndarray:
        """Embeddings of length 1 [N, D], by which `--near-duplicates cosine` compares responses."""
        raise NotImplementedError

    def evaluate(self, answers: list[Answered]) -> dict[str, float] | Awaitable[dict[str, float]]:
        """Figures of an evaluation; may be `async`."""
        return accuracy(answers)

    @contextlib.asynccontextmanager
    async def serving(self, setup: Any) -> AsyncIterator[None]:
        """Load what the reward needs beside the local engines, which have started; give it back when the run ends.

        `reward`, `embed` and `evaluate` are called inside only.

        Args:
            setup: the run's `Setup`; judge_devices (list of str, of `--judge-devices`), search_cores (set of CPU cores)
                and out, the run's folder, are what a task may want.
        """
        yield


def accuracy(answers: list[Answered]) -> dict[str, float]:
    """Figures of an evaluation in which a response is right when its reward is above 0 (so one whose reward failed is
    not), each the mean over problems.

    Returns:
        `greedy`; `pass@1`, the mean over the K samples; `pass@k`, any of the K is right; `distinct`, how many different
        right texts there are among the K; `truncated`, the share of samples that were cut off; and, where rewards are
        other than 0 and 1, `reward`, their mean over the samples.

    >>> def sample(text, reward):
    ...     return Response(np.array([1]), finished=True, text=text, reward=reward)
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
    """The tasks that come with the project: the files beside this one that have a class Task."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if "\nclass Task(" in file.read_text(encoding="utf-8"))


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
    task = getattr(import_file("task", name), "Task", None)
    if not (isinstance(task, type) and issubclass(task, Task) and task is not Task):
        raise ValueError(f"task is {name!r}: it must have a class Task, made from tasks.Task")
    return task


def import_file(field: str, value: str) -> ModuleType:
    """The module of the user's Python file that a setting gives as FILE.py or FILE.py:NAME, executed once a process.

    Raises:
        ValueError: names the setting, its value and what is wrong, in one line.
    """
    path = Path(value if value.endswith(".py") else value.rpartition(":")[0]).resolve()
    name = f"{path.stem}_{zlib.crc32(bytes(path)):08x}"  # is no other module's
    if name not in sys.modules:
        if not path.is_file():
            raise ValueError(f"{field} is {value!r}: there is no such file")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look it up
        try:
            spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            del sys.modules[name]
            complaint = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{field} is {value!r}: it cannot be imported ({complaint})") from error
    return sys.modules[name]
