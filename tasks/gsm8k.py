"""GSM8K: grade-school mathematics, the answer a number (https://arxiv.org/abs/2110.14168).

A record, from the hub's `openai/gsm8k` or from `--data DIR` with train.jsonl and test.jsonl:

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}

The defaults are the paper's for 4 GPUs: 40 to 55 % of the test problems in 700 updates.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

import tasks
from config import Config
from tasks import Problem, data

PROMPT = "[MATH_TASK] Problem:\n{question}\n\nSolution:"
# An optional sign (not the minus of 10-5), an optional $, 1,234.50 | 12 | 12.5 | .5, and the rest of a fraction 3/4
NUMBER = re.compile(
    r"((?<![\w.)])[-+−])?\$?((?:\d{1,3}(?:,\d{3}){1,30}(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?"  # noqa: RUF001
)
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!] ?|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # 1{,}234, 1\,234
LONGEST = 100  # characters of a number: a longer one is no answer, and costs time
END = 10_000  # characters of a text that are looked at, its last: an answer stands there, and more would cost time


class Task(tasks.Task):
    """Prompts as the SFT model saw them; 1.0 for the right number at the end."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a language model on GSM8K, searching and training at once."""

        model: str = "realtreetune/rho-1b-sft-GSM8K"
        data: str = "openai/gsm8k"
        steps: int = 1000
        prompts_per_step: int = 7
        responses_per_prompt: int = 20
        search_responses: int = 24
        lr: float = 1e-5
        lr_schedule: str = "wsd"
        lr_warmup: int = 50
        lr_decay: int = 500
        beta: float = 0.012
        beta_schedule: str = "linear"
        beta_final: float = 0.004
        beta_steps: int = 500
        temperature: float = 0.7
        max_tokens: int = 512
        sync_every: int = 2
        on_policy_prob: float = 0.95
        prime: int = 500
        eval_every: int = 100
        eval_prompts: int = 1319
        eval_samples: int = 4
        save_every: int = 100
        require_finish: bool = False
        """A response that was cut off is wrong, whatever its last number."""

    def problems(self, split: str) -> list[Problem]:
        """The "train" (7,473) or "test" (1,319) problems; the answer is the gold solution."""
        problems = []
        for place, row in data.rows(self.config.data, split, ("question", "answer"), "main", numbers=("answer",)):
            if last_number(row["answer"]) is None:
                raise ValueError(f"{place}: its `answer` holds no number")
            problems.append(Problem(PROMPT.format(question=row["question"]), row["answer"]))
        return problems

    def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        return [
            reward(response.text, problem.answer) if response.finished or not self.config.require_finish else 0.0
            for response in responses
        ]


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: "-$1,234.50." is -2469/2, "3/4" is 3/4, "12%" is 12, "nan" is none."""
    match = None
    for match in NUMBER.finditer(THOUSANDS.sub(",", text[-END:])):  # noqa: B007
        pass
    if match is None or len(match[0]) > LONGEST:
        return None
    sign, number, denominator = match.groups()
    if denominator is not None and int(denominator) == 0:
        return None
    return Fraction(number.replace(",", "")) / int(denominator or 1) * (-1 if sign in ("-", "−") else 1)  # noqa: RUF001


def reward(response: str, answer: str) -> float:
    """1.0 where the last number of the response equals the gold number, the last of `answer`; else 0.0."""
    number = last_number(response)
    return float(number is not None and number == last_number(answer))
