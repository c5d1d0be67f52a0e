r"""MATH: competition mathematics, the answer in \boxed{} (https://arxiv.org/abs/2103.03874).

A record, from the hub's `EleutherAI/hendrycks_math` and `HuggingFaceH4/MATH-500` or from `--data DIR`:

    {"problem": "What is the smallest positive perfect cube that can be written as the sum of three consecutive ...",
     "solution": "The sum of three consecutive integers takes the form ... $27=8+9+10$ is $\\boxed{27}$."}

Where a record has an `answer`, that is the gold answer. The defaults are the paper's for TBA' on 8 GPUs.
"""

import asyncio
import multiprocessing
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from pathlib import Path

import data
import tasks
from config import Config
from tasks import Problem

HUB = "EleutherAI/hendrycks_math"
SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
QUESTION = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LONGEST = 500  # characters of an answer: a longer one is wrong, and costs time
WORKERS = 4  # at most


class Task(tasks.Task):
    """Prompts through the model's chat template; 1.0 where `math-verify` finds the boxed answer equal to the gold one.

    It runs in processes of its own. One that takes too long is killed, and the answer is wrong.
    """

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a language model on MATH, searching and training at once."""

        model: str = "Qwen/Qwen2.5-7B"
        data: str = HUB
        test_data: str = "HuggingFaceH4/MATH-500"
        """Where the test problems are, unless --data is a folder."""
        grade_seconds: float = 10.0
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
        max_tokens: int = 3072
        sync_every: int = 2
        on_policy_prob: float = 1.0
        prime: int = 512
        eval_every: int = 50
        eval_prompts: int = 500
        eval_samples: int = 1
        save_every: int = 50

    def __init__(self, config: Config, tokenizer):
        from pebble import ProcessPool

        super().__init__(config, tokenizer)
        workers = min(WORKERS, max(1, (multiprocessing.cpu_count() or 1) // 2))
        self.pool = ProcessPool(workers, context=multiprocessing.get_context("spawn"))  # starts with the first answer

    def problems(self, split: str) -> list[Problem]:
        """The "train" (7,500) or "test" (500) problems; the answer is what stands in the gold solution's box."""
        source = self.config.data
        if split == "test" and not Path(source).is_dir():
            source = self.config.test_data
        found = []
        for name in SUBJECTS if source == HUB else (None,):
            for place, row in data.rows(source, split, ("problem", "solution"), name):
                answer = row.get("answer") or boxed(row["solution"])
                if not answer:
                    raise ValueError(f"{place}: its `solution` holds no \\boxed{{}} answer")
                found.append(Problem([{"role": "user", "content": QUESTION.format(problem=row["problem"])}], answer))
        return found

    async def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        return await asyncio.gather(*(self.grade(problem.answer, boxed(response.text)) for response in responses))

    async def grade(self, gold: str, answer: str | None) -> float:
        """1.0 where the answer equals the gold one; else, and where that takes too long, 0.0."""
        if not answer or len(answer) > LONGEST:
            return 0.0
        if answer.strip() == gold.strip():
            return 1.0
        try:
            return await asyncio.wrap_future(
                self.pool.schedule(equal, (gold, answer), timeout=self.config.grade_seconds)
            )
        except TimeoutError:
            return 0.0

    def end(self) -> None:
        self.pool.stop()
        self.pool.join()


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} that is closed; None where there is none.

    >>> boxed(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, min(len(text), begin + LONGEST + 2)):
        if text[place - 1] != "\\":  # \{ and \} are brackets of a set
            depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin + 1 : place]
    return boxed(text[:start]) if text.count("\\boxed{", 0, start) < LONGEST else None


def equal(gold: str, answer: str) -> float:
    """1.0 where two answers in LaTeX are the same; else 0.0."""
    from math_verify import parse, verify

    return float(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))
