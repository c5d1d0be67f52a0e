r"""MATH: competition mathematics, the answer in \boxed{} (https://arxiv.org/abs/2103.03874).

A record, from the hub's `EleutherAI/hendrycks_math` and `HuggingFaceH4/MATH-500` or from `--data DIR`:

    {"problem": "What is the smallest positive perfect cube that can be written as the sum of three consecutive ...",
     "solution": "The sum of three consecutive integers takes the form ... $27=8+9+10$ is $\\boxed{27}$."}

Where a record has an `answer`, text or a number, that is the gold answer, and it needs no `solution`. The defaults are
the paper's for TBA' on 8 GPUs, where a 7B model trains: that takes 122 GB, so several GPUs here, or `--lora-rank`.
`--model Qwen/Qwen2.5-1.5B` fits one of 80 GB.
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

# What `plain` makes one of what is written in many ways: none of it changes what an answer means.
SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le "}  # noqa: RUF001
    | {"≥": r"\ge ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "²": "^2", "³": "^3"}
)
REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"√\s*\(?(\d+|(?<=\()[^()]*(?=\))|\w)\)?", r"\\sqrt{\1}"),
        (r"(?<=\d)(?:\\[,;: ]|~|[\u2009\u202f])(?=\d{3}(?!\d))|(?<!\\)\\!\s*", ""),  # 10\,080 and 10,\!080
        (r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|(?:thin|med|thick)space)(?![a-zA-Z])|\\[hv]space\*?\{[^{}]*\}|\s+", " "),
        (r"(?<!\\)(?:\$|\\[()\[\]])", ""),  # around mathematics
        (r"\\(?:bf|rm|it|sf|tt|bfseries|(?:display|text)style|small|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])\s*", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?=\s*(?:[()\[\]|.]|\\[{}|]))", ""),
        (r"\\(?:text)?color\s*\{\w*\}", ""),
        (r"\\([lg]e)q?slant(?![a-zA-Z])", r"\\\1"),
        (r"(?<=\\\\)\[[\d.]+ ?[a-z]+\]", ""),  # space below a row
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\\degree(?![a-zA-Z])", r"^\\circ"),
    )
]
FONT = re.compile(
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal|up|md)?|[mhf]?box|boxed|ensuremath|boldsymbol|bm|pmb|emph|underline)\s*(?=\{)"
)
SPACE, BARE = re.compile(r"\s*"), re.compile(r"[^\s{}$\\.,]+")
WORDS = re.compile(r"\\text\{([^{}]*)\}")
LOOSE = re.compile(r"(?<![a-zA-Z0-9]) +| +(?![a-zA-Z0-9])")  # spaces, but between letters or digits
BASE = re.compile(r"(?<=[0-9A-F])_\{?(\d+)")  # of 52_8
BRACKET = re.compile(r"^(?:(\\\{)|[(\[])")  # of a set, or of a pair or an interval

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
        for place, row in data.rows(source, split, ("problem",), None, ("solution", "answer"), numbers=("answer",)):
            solution = row.get("solution") or ""
            answer = row.get("answer") or boxed(solution, longest=len(solution))
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
    r"""What stands in the last \boxed{}, or else \fbox{}, that is closed and at most `longest` long; None without one.

    >>> boxed(r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed(r"$\boxed 2$.")  # as a few gold solutions have it
    '2'
    """
    for command in ("\\boxed", "\\fbox"):
        for start in itertools.islice(_last_first(text, command), longest):
            begin = SPACE.match(text, start + len(command), start + longest).end()
            if text[begin : begin + 1] != "{":
                if bare := BARE.match(text, begin, begin + longest):
                    return bare[0]
            elif end := _closing(text, begin, longest):
                return text[begin + 1 : end]
    return None


def _closing(text: str, begin: int, longest: int) -> int | None:
    r"""The index of the brace that closes the one at `begin`; \{ and \} are brackets of a set."""
    depth = 0
    for i in range(begin, min(len(text), begin + longest + 2)):
        if text[i - 1] != "\\" or i == begin:
            depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return i
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


def plain(latex: str) -> str:
    r"""An answer without what does not change its meaning: fonts, spaces, dollars, colours, a full stop, braces.

    >>> plain(r"$\mathbf{10\,080}$."), plain(r"\text{\frac{1}{2}}"), plain("{\\bf June 20}"), plain(r"5\mbox{ cm}^2")
    ('10080', '\\frac{1}{2}', 'June 20', '5\\text{cm}^2')
    """
    latex = latex.translate(SYMBOLS)
    for pattern, by in REWRITES:
        latex = pattern.sub(by, latex)
    for font in reversed(list(FONT.finditer(latex))):  # the inner ones first
        before, begin = latex[: font.start()], font.end()
        if end := _closing(latex, begin, len(latex)):
            inside, after = latex[begin + 1 : end].strip().rstrip("."), latex[end + 1 :]
            if "\\" not in inside and re.search(r"[a-zA-Z]{2}", inside):  # words, or words among numbers
                words = r"[a-zA-Z]{2,}" if re.search(r"\d", inside) else r".+"
                inside = re.sub(words, r"\\text{\g<0>}", inside)
            elif re.search(r"(?:[\^_]|\\[a-zA-Z]+)\s*$", before):
                inside = f"{{{inside}}}"
            latex = before + inside + after
    while True:
        latex = latex.lstrip(" =").rstrip(" .,;:。\\")
        if not (latex.startswith("{") and _closing(latex, 0, len(latex)) == len(latex) - 1):
            return latex
        latex = latex[1:-1]


def equal(gold: str, answer: str) -> float:
    """1.0 where two answers in LaTeX are the same; else 0.0. The caller limits its time."""
    from math_verify import LatexExtractionConfig, parse, verify

    gold, answer = plain(gold), plain(answer)
    bare = {LOOSE.sub("", WORDS.sub(r"\1", each)) for each in (gold, answer)}
    if len(bare) == 1:
        return float(bool(answer))
    for trait in (BASE, BRACKET):  # which math-verify does not tell apart
        ours, theirs = trait.findall(gold), trait.findall(answer)
        if ours and theirs and ours != theirs:
            return 0.0
    # All of it as LaTeX, or a number inside of what cannot be read would be taken for the answer.
    reads = dict(extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    one, other = (parse(f"\\boxed{{{each}}}", **reads) for each in (gold, answer))
    return float(verify(one, other, allow_set_relation_comp=True, timeout_seconds=None) and not _far_apart(one, other))


def _far_apart(gold: list, answer: list) -> bool:
    """Whether two numbers differ by more than 0.1 %: math-verify rounds to six places, where tiny ones are equal."""
    from sympy import Expr, UnevaluatedExpr

    both = [next(iter(each), None) for each in (gold, answer)]
    if not all(isinstance(each, Expr) and each.is_comparable and not each.has(UnevaluatedExpr) for each in both):
        return False  # one is no number, or has a percent sign
    one, other = (each.evalf() for each in both)
    return bool(abs(one - other) > 1e-3 * max(abs(one), abs(other)))
