"""Prompts: as tokens, in their order, and with demonstrations."""

import datetime
import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from buffer import Response
from rewards.judges import special_tokens_behind
from tasks import Problem
from tasks.data import is_text, read_jsonl

TODAY = datetime.date(2024, 7, 26)  # in templates that tell the date: else a run resumed tomorrow had other prompts

log = logging.getLogger("tba")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem's prompt as the model sees it."""

    problem: Problem
    text: str
    tokens: np.ndarray  # int32 [P]


def tokenize(problems: Sequence[Problem], tokenizer, max_length: int) -> list[Prompt]:
    """The prompts of problems; one of more than `max_length` tokens is left out.

    Raises:
        ValueError: that leaves none, or a prompt is a chat and the model has no chat template.
    """
    chats = [problem.prompt for problem in problems if not isinstance(problem.prompt, str)]
    if chats and not tokenizer.chat_template:
        raise ValueError(
            f"model is {tokenizer.name_or_path!r}: it has no chat template, which this task's prompts need; "
            "take a model tuned for chat"
        )
    if not problems:
        raise ValueError("the task has no problems")
    rendered = []
    try:
        if chats:
            rendered = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=False, strftime_now=TODAY.strftime
            )
    except Exception as error:  # a template may refuse what it does not know
        raise ValueError(f"model is {tokenizer.name_or_path!r}: its chat template refuses a prompt ({error})") from None
    plain = [problem.prompt for problem in problems if isinstance(problem.prompt, str)]
    # A chat template writes the special tokens itself. One that is put behind plain text would end the prompt.
    behind = special_tokens_behind(tokenizer)
    ids_plain = [ids[: len(ids) - behind] for ids in tokenizer(plain).input_ids] if plain else []
    ids_chats = tokenizer(rendered, add_special_tokens=False).input_ids if chats else []
    of_plain, of_chats = zip(plain, ids_plain, strict=True), zip(rendered, ids_chats, strict=True)
    prompts = []
    for problem in problems:
        text, ids = next(of_plain if isinstance(problem.prompt, str) else of_chats)
        if 0 < len(ids) <= max_length:
            prompts.append(Prompt(problem, text, np.array(ids, dtype=np.int32)))
    if not prompts:
        raise ValueError(
            f"max_tokens leaves {max_length} of the model's tokens to a prompt: none of {len(problems)} problems fits"
        )
    if len(prompts) < len(problems):
        log.info(
            f"{len(problems) - len(prompts)} of {len(problems)} prompts are longer than {max_length} tokens: left out"
        )
    return prompts


class PromptSampler:
    """Ids of the training prompts without end, in a new random order each epoch.

    Args:
        count: prompts.
        seed: of `rng`, from which a run draws the seeds and temperatures of its searches too.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.rng = count, random.Random(seed)
        self.remaining: list[int] = []  # of this epoch, the next one last
        self.in_flight: list[int] = []  # sampled, and not `done`

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.remaining:
            self.remaining = list(range(self.count))
            self.rng.shuffle(self.remaining)
        self.in_flight.append(self.remaining.pop())
        return self.in_flight[-1]

    def done(self, prompt_id: int) -> None:
        """Take a prompt out of flight: its responses are stored, and a resumed run need not search it again."""
        self.in_flight.remove(prompt_id)

    def state_dict(self) -> dict:
        """The state in JSON's types. Prompts in flight come first where it is loaded."""
        return {"left": self.remaining + self.in_flight[::-1], "rng": self.rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        self.remaining, self.in_flight = list(state["left"]), []
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))


def demonstrations(
    path: str, prompts: Sequence[Prompt], tokenizer, min_tokens: int, max_tokens: int
) -> dict[int, list[Response]]:
    """Responses of a JSONL file, by prompt id.

    A row is {"prompt": ..., "response": ..., "reward": ...}; without a reward the task scores the response. The prompt
    is that of a training problem, as text (as the model sees it) or as the messages of a chat. A response of more than
    `max_tokens` or not above `min_tokens` tokens, its end included, is left out.

    Raises:
        ValueError: a row is not so; says which line.
    """
    if not Path(path).is_file():
        raise ValueError(f"seed_data is {path!r}: there is no such file")
    prompt_ids = {prompt.text: i for i, prompt in enumerate(prompts)}
    prompt_ids |= {json.dumps(prompt.problem.prompt, sort_keys=True): i for i, prompt in enumerate(prompts)}
    by_prompt: dict[int, list[Response]] = {}
    count = 0
    for count, (place, row) in enumerate(read_jsonl(Path(path)), 1):  # noqa: B007
        if not (isinstance(row, dict) and "prompt" in row and is_text(row.get("response"))):
            raise ValueError(f"{place}: a row needs `prompt` and `response`")
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], sort_keys=True)
        if prompt not in prompt_ids:
            raise ValueError(f"{place}: its `prompt` is not one of the {len(prompts)} training problems'")
        reward = row.get("reward")
        if reward is not None and not (type(reward) in (int, float) and abs(reward) < 1e30):
            raise ValueError(f"{place}: its `reward` must be a finite number")
        tokens = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if min_tokens < len(tokens) <= max_tokens:
            reward = math.nan if reward is None else float(reward)
            response = Response(np.array(tokens, dtype=np.int32), finished=True, reward=reward)
            by_prompt.setdefault(prompt_ids[prompt], []).append(response)
    if not by_prompt:
        raise ValueError(f"seed_data is {path!r}: none of its {count} rows fits min_tokens and max_tokens")
    if (fit := sum(map(len, by_prompt.values()))) < count:
        log.info(f"{count - fit} of {count} demonstrations do not fit min_tokens and max_tokens: left out")
    return by_prompt
