"""GSM8K: grade-school mathematics, the answer a number (https://arxiv.org/abs/2110.14168).

A record, from the hub's `openai/gsm8k` or from `--data DIR` with train.jsonl and test.jsonl:

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}

The defaults are the paper's for 4 GPUs: 40 to 55 % of the test problems in 700 updates.
"""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from config import Config
from tasks import Problem


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


PROMPT = "[MATH_TASK] Problem:\n{question}\n\nSolution:"
# An optional sign (not the minus of 10-5), an optional $, 1,234.50 | 12 | 12.5 | .5, and the rest of a fraction 3/4
NUMBER = re.compile(r"((?<![\w.)])[-+])?\$?((?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?")
LONGEST = 100  # characters of a number: a longer one is no answer, and costs time


def problems(split: str, config: Settings) -> list[Problem]:
    """The "train" (7,473) or "test" (1,319) problems.

    Raises:
        ValueError: `config.data` is a folder without the split's file, or a row of it is not as above.
    """
    rows = read_jsonl(Path(config.data) / f"{split}.jsonl") if Path(config.data).is_dir() else read_hub(config, split)
    found = []
    for where, row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(f"{where}: a row needs the strings `question` and `answer`")
        if last_number(row["answer"]) is None:
            raise ValueError(f"{where}: its `answer` holds no number")
        found.append(Problem(PROMPT.format(question=row["question"]), row["answer"]))
    return found


def read_jsonl(path: Path):
    """(place, row) of each line that is not blank."""
    if not path.is_file():
        raise ValueError(f"data: there is no {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None


def read_hub(config, split: str):
    """(place, row) of each row of a data set on the Hugging Face hub."""
    import datasets

    try:
        rows = datasets.load_dataset(config.data, "main", split=split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"data is {config.data!r}: neither a folder nor to be had from the hub ({reason})") from None
    return ((f"{config.data} {split} row {i}", row) for i, row in enumerate(rows))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: "-$1,234.50." is -2469/2, "3/4" is 3/4, "12%" is 12, "nan" is none."""
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007
        pass
    if found is None or len(found[0]) > LONGEST:
        return None
    sign, number, denominator = found.groups()
    if denominator is not None and int(denominator) == 0:
        return None
    return Fraction(number.replace(",", "")) / int(denominator or 1) * (-1 if sign == "-" else 1)


def reward(response: str, answer: str) -> float:
    """1.0 where the last number of the response equals the gold number, the last of `answer`; else 0.0."""
    number = last_number(response)
    return float(number is not None and number == last_number(answer))
