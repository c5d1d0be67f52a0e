"""Countdown: make a target out of given numbers. The embedded default, which needs nothing from outside.

    prompt    "12 45 33=24:"
    response  "45+12-33"        right, as are "12+45-33", "45-33+12" and "12-33+45": diversity can be counted

It brings its own model, which is trained when it is first needed: countdown_model.py.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import tasks
from config import Config
from tasks import Problem
from tasks.countdown_model import TARGETS, held_out, prepare, random_expression

MIN_CHAT_TOKENS = 32  # of a response in words
PROBLEMS = {"train": 20_000, "test": 2_000}
LONGEST = 100  # characters of a response that is read at all
QUESTION = """\
Using each of the numbers {numbers} exactly once, with +, -, * and / and brackets, write an expression that equals \
{target}. Think step by step, then give the expression alone between <answer> and </answer>, \
for example <answer>(1 + 2) / 3</answer>."""


class Task(tasks.Task):
    """The embedded model reads the problem as it is; for a model with a chat template it is put into words."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a small model on Countdown, searching and training at once."""

        model: str = "embedded"
        numbers: Literal[3, 4] = 3
        """Numbers in a problem. With 4 the embedded model is right 3 times in a hundred: sparse rewards."""
        loss: str = "tb_tapered"
        steps: int = 1500
        prompts_per_step: int = 16
        responses_per_prompt: int = 16
        search_responses: int = 16
        lr: float = 3e-4
        lr_schedule: str = "linear"
        beta: float = 0.03
        temperature: float = 1.0
        max_tokens: int = 13
        sync_every: int = 2
        on_policy_prob: float = 0.95
        prime: int = 512
        eval_every: int = 300
        eval_prompts: int = 400
        eval_samples: int = 8
        save_every: int = 300

    def __init__(self, config: Settings, tokenizer):
        super().__init__(config, tokenizer)
        if tokenizer and self.chat and config.max_tokens < MIN_CHAT_TOKENS:
            complaint = f"max_tokens is {config.max_tokens}: a model that is asked in words needs room for them"
            raise ValueError(f"{complaint}; --max-tokens 512 --lr 1e-6 is a start")

    @classmethod
    def model(cls, config: Settings) -> str:
        if config.model != "embedded":
            return config.model
        return prepare(config.seed, config.numbers, trained=not (config.dry_run or config.plan))

    def problems(self, split: str) -> list[Problem]:
        """Random problems that have a solution. "train" and "test" never have numbers and target in common."""
        rng = random.Random(f"countdown {split}")
        problems: dict[tuple[str, int], Problem] = {}
        while len(problems) < PROBLEMS[split]:
            numbers, _, target = random_expression(rng, self.config.numbers)
            if target in TARGETS and held_out(numbers, target) == (split == "test"):
                listed = " ".join(map(str, numbers))
                question = QUESTION.format(numbers=listed, target=target)
                prompt = [{"role": "user", "content": question}] if self.chat else f"{listed}={target}:"
                problems[listed, target] = Problem(prompt, {"numbers": numbers, "target": target})
        return list(problems.values())

    def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        expression = tagged if self.chat else str
        return [reward(expression(response.text), problem.answer) for response in responses]

    @property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.tokenizer.chat_template)


def tagged(text: str) -> str:
    """The text between the last <answer> and its </answer>; none where they are missing."""
    begin = text.rfind("<answer>")
    end = text.find("</answer>", begin)
    return text[begin + len("<answer>") : end] if begin >= 0 and end >= 0 else ""


def reward(response: str, answer: dict) -> float:
    """1.0 where the response is an expression over exactly the given numbers that makes the target; else 0.0."""
    response = response.strip()
    if len(response) > LONGEST or Counter(re.findall(r"\d+", response)) != Counter(map(str, answer["numbers"])):
        return 0.0
    try:
        return float(evaluate(response) == answer["target"])
    except (ValueError, ZeroDivisionError):
        return 0.0


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of whole numbers, + - * / and brackets.

    By two stacks (shunting-yard), so that nesting costs no recursion, and never by Python's `eval`.

    Raises:
        ValueError: it is none.
        ZeroDivisionError: it divides by zero.

    >>> evaluate("8/(3-8/3)")
    Fraction(24, 1)
    """
    precedence = {"+": 1, "-": 1, "*": 2, "/": 2}
    values: list[Fraction] = []
    pending: list[str] = []

    def apply() -> None:
        operator, right, left = pending.pop(), values.pop(), values.pop()
        values.append(
            left + right if operator == "+" else left - right if operator == "-"
            else left * right if operator == "*" else left / right
        )  # fmt: skip

    operand_next = True
    for token in re.findall(r"\d+|\S", expression):
        if token.isdecimal() and operand_next:
            values.append(Fraction(token))
            operand_next = False
        elif token == "(" and operand_next:
            pending.append(token)
        elif token in precedence and not operand_next:
            while pending and precedence.get(pending[-1], 0) >= precedence[token]:
                apply()
            pending.append(token)
            operand_next = True
        elif token == ")" and not operand_next and "(" in pending:
            while pending[-1] != "(":
                apply()
            pending.pop()
        else:
            raise ValueError(f"unexpected {token!r} in {expression!r}")
    if operand_next or "(" in pending:
        raise ValueError(f"incomplete: {expression!r}")
    while pending:
        apply()
    return values.pop()
