r"""MATH: competition mathematics, the answer in \boxed{} (https://arxiv.org/abs/2103.03874).

A record, from the hub's `EleutherAI/hendrycks_math` and `HuggingFaceH4/MATH-500` or from `--data DIR`:

    {"problem": "What is the smallest positive perfect cube that can be written as the sum of three consecutive ...",
     "solution": "The sum of three consecutive integers takes the form ... $27=8+9+10$ is $\\boxed{27}$."}

Where a record has an `answer`, that is the gold answer. The defaults are the paper's for TBA' on 8 GPUs, where a 7B
model trains; here one GPU trains, and needs 122 GB for it. `--model Qwen/Qwen2.5-1.5B` fits 80 GB.
"""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import re
import resource
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

import tasks
from config import Config
from tasks import Problem, data

HUB, HUB_TEST = "EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"
QUESTION = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LONGEST = 500  # characters of an answer: a longer one is wrong, and costs time
WORKERS, MEMORY = 4, 2**30  # at most; bytes that an answer may take

log = logging.getLogger("tba")


class Task(tasks.Task):
    """Prompts through the model's chat template; 1.0 where `math-verify` finds the boxed answer equal to the gold one.

    It runs in processes of its own. One that takes too long is killed, and the answer is wrong.
    """

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a language model on MATH, searching and training at once."""

        model: str = "Qwen/Qwen2.5-7B"
        data: str = HUB
        test_data: str = ""
        """Where the test problems are; default: --data where that is a folder, else HuggingFaceH4/MATH-500."""
        grade_seconds: Annotated[float, Gt(0)] = 3.0
        """Time to compare an answer with the gold one."""
        loss: str = "tb_prime"
        steps: int = 400
        prompts_per_step: int = 32
        responses_per_prompt: int = 16
        search_responses: int = 16
        lr: float = 1e-6
        beta: float = 0.005
        reference_reset: int = 50
        temperature: float = 1.0
        max_tokens: int = 2560
        reward_timeout: float = 600.0
        sync_every: int = 2
        on_policy_prob: float = 1.0
        prime: int = 512
        eval_every: int = 50
        eval_prompts: int = 500
        eval_samples: int = 1
        save_every: int = 50

    def problems(self, split: str) -> list[Problem]:
        """The "train" (7,500) or "test" (500) problems; the answer is what stands in the gold solution's box."""
        source = self.config.data
        if split == "test":
            source = self.config.test_data or (source if Path(source).is_dir() else HUB_TEST)
        problems, without = [], []
        for place, row in data.rows(source, split, ("problem", "solution"), optional=("answer",)):
            answer = row.get("answer") or boxed(row["solution"], longest=len(row["solution"]))
            if answer:
                problems.append(Problem([{"role": "user", "content": QUESTION.format(problem=row["problem"])}], answer))
            else:
                without.append(place)
        if without:
            complaint = f"{without[0]}: its `solution` holds no \\boxed{{}} answer"
            if not problems:
                raise ValueError(complaint)
            log.info(f"{complaint}; {len(without)} such problems are left out")
        return problems

    @contextlib.asynccontextmanager
    async def serving(self, setup) -> AsyncIterator[None]:
        from pebble import ProcessPool

        workers = min(WORKERS, max(1, (multiprocessing.cpu_count() or 1) // 2))
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(workers, initializer=prepare_worker, context=spawn)  # starts with the first answer
        try:
            yield
        finally:
            self.pool.stop()
            self.pool.join()

    async def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        answers = [boxed(response.text) for response in responses]
        distinct = list(dict.fromkeys(answers))
        grades = await asyncio.gather(*(self.grade(problem.answer, answer) for answer in distinct))
        return [dict(zip(distinct, grades, strict=True))[answer] for answer in answers]

    async def grade(self, gold: str, answer: str | None) -> float:
        """1.0 where the answer equals the gold one; else, and where that takes too long or too much memory, 0.0."""
        from pebble import ProcessExpired

        if not answer:
            return 0.0
        if answer.strip() == gold.strip():
            return 1.0
        try:
            return await asyncio.wrap_future(
                self.pool.schedule(equal, (gold, answer), timeout=self.config.grade_seconds)
            )
        except (TimeoutError, ProcessExpired):
            return 0.0


def boxed(text: str, longest: int = LONGEST) -> str | None:
    r"""What stands in the last \boxed{} that is closed and not longer than `longest`; None where there is none.

    >>> boxed(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed(r"$\boxed 2$.")  # as a few gold solutions have it
    '2'
    """
    for start in itertools.islice(_last_first(text, "\\boxed"), longest):
        begin, depth = start + len("\\boxed"), 0
        if text[begin : begin + 1] != "{":
            if bare := re.match(r" *([^\s{}$\\.,]+)", text[begin : begin + longest]):
                return bare[1]
            continue
        for i in range(begin, min(len(text), begin + longest + 2)):
            if text[i - 1] != "\\":  # \{ and \} are brackets of a set
                depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[begin + 1 : i]
    return None


def _last_first(text: str, part: str) -> Iterator[int]:
    """The indices at which a part of a text begins, the last first."""
    start = len(text)
    while (start := text.rfind(part, 0, start)) >= 0:
        yield start


def prepare_worker() -> None:
    """Before the first answer: import what takes time, and let none take all memory."""
    import math_verify  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def equal(gold: str, answer: str) -> float:
    """1.0 where two answers in LaTeX are the same; else 0.0. The caller limits its time."""
    from math_verify import parse, verify

    parsed = (parse(f"\\boxed{{{each}}}", parsing_timeout=None) for each in (gold, answer))
    return float(verify(*parsed, timeout_seconds=None))
