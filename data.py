"""Rows of data sets, from the Hugging Face hub or a folder, and prompts as the model sees them."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from searcher import Response
from tasks import Problem


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem's prompt as the model sees it."""

    problem: Problem
    text: str
    tokens: np.ndarray  # int32 [P]


class Order:
    """Ids of the training prompts without end, in a new random order each time round.

    Args:
        count: of the prompts.
        rng: shuffles them.
    """

    def __init__(self, count: int, rng: random.Random):
        self.count, self.rng = count, rng
        self.left: list[int] = []  # the next one last
        self.out: list[int] = []  # taken, and not `done`

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.left:
            self.left = list(range(self.count))
            self.rng.shuffle(self.left)
        self.out.append(self.left.pop())
        return self.out[-1]

    def done(self, prompt_id: int) -> None:
        """Its responses have come: a run that goes on from here need not ask again."""
        self.out.remove(prompt_id)

    def state(self) -> dict:
        """What `restore` takes, as JSON has it: what is out comes first then."""
        return {"left": self.left + self.out[::-1], "rng": self.rng.getstate()}

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        self.left = list(state["left"])
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))


def rows(
    data: str, split: str, columns: Sequence[str], name: str | None = None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a split.

    Args:
        data: a data set on the hub; or a folder, with <split>.jsonl, <split>.json (a list) or as it is on the hub.
        split: its name.
        columns: that every row must have, as text that is not blank.
        name: of the configuration, where the data set has it; of one with others, all are read.
        optional: columns that a row may have, as text.

    Raises:
        ValueError: there is no such split, it has no rows, or a row is not so; says which file and line.
    """
    folder, empty = Path(data), True
    if (folder / f"{split}.jsonl").is_file():
        found = read_jsonl(folder / f"{split}.jsonl")
    elif (folder / f"{split}.json").is_file():
        found = read_json(folder / f"{split}.json")
    else:
        found = read_hub(data, split, name, [*columns, *optional])
    for place, row in found:
        empty = False
        row = row if isinstance(row, dict) else {}
        if any(not isinstance(row.get(column), str) or not row[column].strip() for column in columns):
            raise ValueError(f"{place}: a row needs {' and '.join(f'`{column}`' for column in columns)}, as text")
        if any(not isinstance(row.get(column, ""), str) for column in optional):
            raise ValueError(f"{place}: {' and '.join(f'`{column}`' for column in optional)} must be text")
        yield place, row
    if empty:
        raise ValueError(f"data is {data!r}: its {split} split is empty")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", read_text(line, f"{path}:{number}")


def read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each item of a list."""
    items = read_text(path.read_bytes(), str(path))
    return ((f"{path} row {i}", item) for i, item in enumerate(items if isinstance(items, list) else [items]))


def read_text(text: bytes, place: str):
    """What a text in JSON says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise ValueError(f"{place}: not JSON ({error})") from None


def read_hub(data: str, split: str, name: str | None, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a data set on the hub, or of a folder that is like one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        names = datasets.get_dataset_config_names(data)
        for each in [name] if name in names else names:
            table = datasets.load_dataset(data, each, split=split)
            table = table.select_columns([column for column in columns if column in table.column_names])
            yield from ((f"{data} {each} {split} row {i}", row) for i, row in enumerate(table))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if Path(data).is_dir():
            raise ValueError(f"data is {data!r}: it has no {split}.jsonl, and is no data set ({reason})") from None
        raise ValueError(f"data is {data!r}: neither a folder nor to be had from the hub ({reason})") from None


def encode(problems: Sequence[Problem], tokenizer, room: int) -> list[Prompt]:
    """Problems with their prompts as the model sees them; a prompt longer than `room` tokens is left out.

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
    try:
        rendered = iter(
            tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False) if chats else []
        )
    except Exception as error:  # a template may refuse what it does not know
        raise ValueError(f"model is {tokenizer.name_or_path!r}: its chat template refuses a prompt ({error})") from None
    texts = [problem.prompt if isinstance(problem.prompt, str) else next(rendered) for problem in problems]
    # A chat template writes the special tokens itself.
    tokens = tokenizer(texts, add_special_tokens=not chats).input_ids
    prompts = [
        Prompt(problem, text, np.array(ids, dtype=np.int32))
        for problem, text, ids in zip(problems, texts, tokens, strict=True)
        if 0 < len(ids) <= room
    ]
    if not prompts:
        raise ValueError(
            f"max_tokens leaves {room} of the model's tokens to a prompt: none of {len(problems)} problems fits"
        )
    if len(prompts) < len(problems):
        print(f"{len(problems) - len(prompts)} of {len(problems)} prompts are longer than {room} tokens: left out")
    return prompts


def demonstrations(
    path: str, prompts: Sequence[Prompt], tokenizer, min_tokens: int, max_tokens: int
) -> dict[int, list[Response]]:
    """Responses of a JSONL file, by the index of their prompt.

    A row is {"prompt": ..., "response": ..., "reward": ...}; the reward may be left out, and is then nan: the task will
    give it. The prompt is that of a training problem, as text (as the model sees it) or as the messages of a chat. A
    response of more than `max_tokens` or not above `min_tokens` tokens, its end included, is left out.

    Raises:
        ValueError: a row is not so; says which line.
    """
    if not Path(path).is_file():
        raise ValueError(f"seed_data is {path!r}: there is no such file")
    known = {prompt.text: i for i, prompt in enumerate(prompts)}
    known |= {json.dumps(prompt.problem.prompt, sort_keys=True): i for i, prompt in enumerate(prompts)}
    found: dict[int, list[Response]] = {}
    count = 0
    for count, (place, row) in enumerate(read_jsonl(Path(path)), 1):  # noqa: B007
        if not (isinstance(row, dict) and "prompt" in row and isinstance(row.get("response"), str)):
            raise ValueError(f"{place}: a row needs `prompt` and `response`")
        asked = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], sort_keys=True)
        if asked not in known:
            raise ValueError(f"{place}: its `prompt` is not one of the {len(prompts)} training problems'")
        reward = row.get("reward")
        if reward is not None and not (type(reward) in (int, float) and abs(reward) < 1e30):
            raise ValueError(f"{place}: its `reward` must be a finite number")
        tokens = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if min_tokens < len(tokens) <= max_tokens:
            response = Response(np.array(tokens, dtype=np.int32), finished=True, logprobs=None)
            response.reward = math.nan if reward is None else float(reward)
            found.setdefault(known[asked], []).append(response)
    if not found:
        raise ValueError(f"seed_data is {path!r}: none of its {count} rows fits min_tokens and max_tokens")
    if (fit := sum(map(len, found.values()))) < count:
        print(f"{count - fit} of {count} demonstrations do not fit min_tokens and max_tokens: left out")
    return found
