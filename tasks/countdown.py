"""Countdown: make a target out of given numbers. The embedded default, which needs nothing from outside.

    prompt    "12 45 33=24:"
    response  "45+12-33"        right, as are "12+45-33", "45-33+12" and "12-33+45": diversity can be counted

It brings its own model: a character-level Llama of 0.1 million parameters, trained on demonstrations when it is first
needed, and kept in the user's cache folder. The demonstrations are random expressions over the numbers. In the last
quarter of the warm-up half of them have a target that they do not make: the model then knows more than it shows, which
is what reinforcement has to mend.
"""

import atexit
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import tasks
from config import Config
from screen import COLUMNS, say
from tasks import Problem

LEAST_WORDS = 32  # tokens
LARGEST, TARGETS = 50, range(1, 100)
HELD_OUT = 26  # of 256 problems
PROBLEMS = {"train": 20_000, "test": 2_000}
LONGEST = 100  # characters of a response that is read at all


class Task(tasks.Task):
    """The embedded model gets the problem as it is; a model with a chat template is asked in words."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a small model on Countdown, searching and training at once."""

        model: str = "embedded"
        numbers: Literal[3, 4] = 3
        """Numbers in a problem. With 4 the embedded model is right 3 times in a hundred: sparse rewards."""
        steps: int = 2400
        prompts_per_step: int = 16
        responses_per_prompt: int = 16
        search_responses: int = 16
        lr: float = 1e-4
        lr_schedule: str = "linear"
        beta: float = 0.05
        temperature: float = 1.0
        max_tokens: int = 13
        sync_every: int = 2
        on_policy_prob: float = 0.95
        prime: int = 512
        eval_every: int = 600
        eval_prompts: int = 400
        eval_samples: int = 8
        save_every: int = 600

    def __init__(self, config: Settings, tokenizer):
        super().__init__(config, tokenizer)
        if tokenizer and self.chat and config.max_tokens < LEAST_WORDS:
            room = f"max_tokens is {config.max_tokens}: a model that is asked in words needs room for them"
            raise ValueError(f"{room}; --max-tokens 512 --lr 1e-6 is a start")

    @classmethod
    def model(cls, config: Settings) -> str:
        return prepare(config) if config.model == "embedded" else config.model

    def problems(self, split: str) -> list[Problem]:
        """Random problems that have a solution. "train" and "test" never have numbers and target in common."""
        rng = random.Random(f"countdown {split}")
        found: dict[tuple[str, int], Problem] = {}
        while len(found) < PROBLEMS[split]:
            numbers, expression = random_expression(rng, self.config.numbers)
            target = int(evaluate(expression))
            if target in TARGETS and held_out(numbers, target) == (split == "test"):
                listed = " ".join(map(str, numbers))
                question = QUESTION.format(numbers=listed, target=target)
                chat = [{"role": "user", "content": question}] if self.chat else f"{listed}={target}:"
                found[listed, target] = Problem(chat, {"numbers": numbers, "target": target})
        return list(found.values())

    def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        read = tagged if self.chat else str
        return [reward(read(response.text), problem.answer) for response in responses]

    @property
    def chat(self) -> bool:
        """Whether the model is asked through its chat template."""
        return bool(self.tokenizer.chat_template)


# ---- the problems ----

QUESTION = """\
Using each of the numbers {numbers} exactly once, with +, -, * and / and brackets, write an expression that equals \
{target}. Think step by step, then give the expression alone between <answer> and </answer>, \
for example <answer>(1 + 2) / 3</answer>."""


def tagged(text: str) -> str:
    """What stands between the last <answer> and its </answer>; nothing where they are missing."""
    opened = text.rfind("<answer>")
    closed = text.find("</answer>", opened)
    return text[opened + len("<answer>") : closed] if opened >= 0 and closed >= 0 else ""


def held_out(numbers: list[int], target: int) -> bool:
    """Whether a problem is one for testing, in whatever order its numbers stand: one in ten is."""
    return hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()[0] < HELD_OUT


def random_expression(rng: random.Random, count: int) -> tuple[list[int], str]:
    """Numbers, and the same in another order joined by + and -."""
    numbers = [rng.randint(1, LARGEST) for _ in range(count)]
    shuffled = rng.sample(numbers, count)
    return numbers, str(shuffled[0]) + "".join(rng.choice("+-") + str(number) for number in shuffled[1:])


# ---- the reward ----


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


# ---- the embedded model ----

CHARACTERS = "0123456789 +-=:"
# Count the version up with every change.
WARM_UP: dict[str, Any] = dict(hidden=64, layers=2, steps=1300, batch=64, lr=4e-3, wrong_from=0.75, version=2)
WRONG = {3: 0.5, 4: 0.8}  # share of wrong demonstrations from then on, by how many numbers a problem has


def prepare(config: Task.Settings) -> str:
    """The folder of the embedded model for a seed; it is trained first where the cache does not hold it, but for a dry
    run or a plan, which never read its weights."""
    what = [WARM_UP, WRONG, CHARACTERS, config.numbers, LARGEST, list(TARGETS), HELD_OUT, config.seed]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tba"
    folder = cache / f"countdown-{key}"
    if (config.dry_run or config.plan) and not folder.is_dir():
        untrained = tempfile.TemporaryDirectory()
        atexit.register(untrained.cleanup)
        warm_up(Path(untrained.name), config.seed, config.numbers, steps=0)
        return untrained.name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=f"{folder.name}-", dir=cache)
        try:
            warm_up(Path(unfinished), config.seed, config.numbers, WARM_UP["steps"])
            os.rename(unfinished, folder)
        except OSError:  # another run was first
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def warm_up(folder: Path, seed: int, numbers: int, steps: int) -> None:
    """Train the model from scratch on demonstrations and write it as a Hugging Face folder."""
    import torch
    from tqdm import trange
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(f"countdown warm-up {seed}")
    tokenizer, hidden = make_tokenizer(), WARM_UP["hidden"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # exactly: an id without a character would be sampled now and then
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=WARM_UP["layers"],
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,  # the smallest that vLLM takes on the CPU
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), WARM_UP["lr"], betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, max(0.05, math.cos(step / max(1, steps) * math.pi / 2)))
    )
    what, terminal = "warming up the embedded model, once", sys.stderr.isatty()
    if steps and not terminal:
        say(f"{what} ...")
    for step in trange(steps, desc=what, ncols=COLUMNS, disable=not (steps and terminal)):
        wrong = WRONG[numbers] if step >= steps * WARM_UP["wrong_from"] else 0.0
        tokens, labels = encode([demonstration(rng, numbers, wrong) for _ in range(WARM_UP["batch"])])
        model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demonstration(rng: random.Random, count: int, wrong: float) -> tuple[str, str]:
    """(prompt, response) of a problem that is not held out. With probability `wrong` the target is any other, and of 4
    numbers the prompt then has one that the response does not."""
    while True:
        numbers, response = random_expression(rng, count)
        target = int(evaluate(response))
        if rng.random() < wrong:
            target = rng.choice(TARGETS)
            if count == 4:
                numbers[rng.randrange(count)] = rng.randint(1, LARGEST)
        if target in TARGETS and not held_out(numbers, target):
            return f"{' '.join(map(str, numbers))}={target}:", response


def encode(pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of tokens and labels, padded to the longest; the prompt and the padding have no label (-100)."""
    ids = {character: i for i, character in enumerate(CHARACTERS, 1)}
    prompts = [[ids[c] for c in prompt] for prompt, _ in pairs]
    responses = [[ids[c] for c in response] + [0] for _, response in pairs]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens, labels = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        padding = longest - len(prompt) - len(response)
        tokens.append(prompt + response + [0] * padding)
        labels.append([-100] * len(prompt) + response + [-100] * padding)
    return tokens, labels


def make_tokenizer():
    """A tokenizer with a token a character, and one for the end of a sequence."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<eos>"
    tokenizer = Tokenizer(models.WordLevel({end: 0} | {c: i for i, c in enumerate(CHARACTERS, 1)}, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
