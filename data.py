"""Rows of data sets, from the Hugging Face hub or a folder, and prompts as the model sees them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks import Problem


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem's prompt as the model sees it."""

    problem: Problem
    text: str
    tokens: np.ndarray  # int32 [P]


def rows(data: str, split: str, columns: Sequence[str], name: str | None = None) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a split.

    Args:
        data: a data set on the hub; or a folder, with <split>.jsonl, <split>.json (a list) or as it is on the hub.
        split: its name.
        columns: that every row must have, as text that is not blank.
        name: of the configuration, where the data set has several.

    Raises:
        ValueError: there is no such split, it has no rows, or a row is not so; says which file and line.
    """
    folder, empty = Path(data), True
    if (folder / f"{split}.jsonl").is_file():
        found = read_jsonl(folder / f"{split}.jsonl")
    elif (folder / f"{split}.json").is_file():
        found = read_json(folder / f"{split}.json")
    else:
        found = read_hub(data, split, name)
    for place, row in found:
        empty = False
        for column in columns:
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                needed = " and ".join(f"`{column}`" for column in columns)
                raise ValueError(f"{place}: a row needs {needed}, as text")
        yield place, row
    if empty:
        raise ValueError(f"data is {data!r}: its {split} split is empty")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each line that is not blank."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from None


def read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each item of a list."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error})") from None
    return ((f"{path} row {i}", item) for i, item in enumerate(items if isinstance(items, list) else [items]))


def read_hub(data: str, split: str, name: str | None) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a data set on the hub, or of a folder that is like one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(data, name, split=split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if Path(data).is_dir():
            raise ValueError(f"data is {data!r}: it has no {split}.jsonl, and is no data set ({reason})") from None
        raise ValueError(f"data is {data!r}: neither a folder nor to be had from the hub ({reason})") from None
    return ((f"{data} {split} row {i}", row) for i, row in enumerate(table))


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
    rendered = iter(tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False) if chats else [])
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


def demonstrations(path: str, prompts: Sequence[Prompt]) -> list[tuple[int, str, float]]:
    """(index of the prompt, response, reward) of each row of a JSONL file.

    A row is {"prompt": ..., "response": ..., "reward": ...}; the reward may be left out, and is then nan: the task will
    give it. The prompt is that of a training problem, as text (as the model sees it) or as the messages of a chat.

    Raises:
        ValueError: a row is not so; says which line.
    """
    if not Path(path).is_file():
        raise ValueError(f"seed_data is {path!r}: there is no such file")
    known = {prompt.text: i for i, prompt in enumerate(prompts)}
    known |= {json.dumps(prompt.problem.prompt): i for i, prompt in enumerate(prompts)}
    found = []
    for place, row in read_jsonl(Path(path)):
        if not (isinstance(row, dict) and "prompt" in row and isinstance(row.get("response"), str)):
            raise ValueError(f"{place}: a row needs `prompt` and `response`")
        index = known.get(row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"]))
        if index is None:
            raise ValueError(f"{place}: its `prompt` is not one of the {len(prompts)} training problems'")
        reward = row.get("reward")
        if reward is not None and (type(reward) not in (int, float) or not np.isfinite(reward)):
            raise ValueError(f"{place}: its `reward` must be a finite number")
        found.append((index, row["response"], np.nan if reward is None else float(reward)))
    if not found:
        raise ValueError(f"seed_data is {path!r}: it is empty")
    return found
