"""Rows of data sets, from a folder or the Hugging Face hub."""

import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path


def rows(
    data: str,
    split: str,
    columns: Sequence[str],
    name: str | None = None,
    optional: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> Iterator[tuple[str, dict]]:
    """(place, row) of each row of a split; the place is its file and line, for messages.

    Args:
        data: a data set on the hub; or a folder, with <split>.jsonl, <split>.json (a list) or as it is on the hub.
        split: its name.
        columns: that every row must have, as text that is not blank.
        name: of the configuration, where the data set has it; of one with others, all are read.
        optional: columns that a row may have, as text.
        numbers: those of all these that may be numbers, which are read as their text.

    Raises:
        ValueError: there is no such split, it has no rows, or a row is not so; says which file and line.
    """
    folder, empty = Path(data), True
    if (folder / f"{split}.jsonl").is_file():
        all_rows = read_jsonl(folder / f"{split}.jsonl")
    elif (folder / f"{split}.json").is_file():
        path = folder / f"{split}.json"
        items = parse(path.read_bytes(), str(path))
        all_rows = ((f"{path} row {i}", item) for i, item in enumerate(items if isinstance(items, list) else [items]))
    else:
        all_rows = read_hub(data, split, name, [*columns, *optional])
    for place, row in all_rows:
        empty = False
        row = row if isinstance(row, dict) else {}
        for column in numbers:
            if type(row.get(column)) in (int, float):
                row[column] = format(Decimal(str(row[column])), "f")  # 1e-05 is 0.00001
        if any(not is_text(row.get(column)) or not row[column].strip() for column in columns):
            raise ValueError(f"{place}: a row needs {' and '.join(f'`{column}`' for column in columns)}, as text")
        if any(row.get(column) is not None and not is_text(row[column]) for column in optional):
            raise ValueError(f"{place}: {' and '.join(f'`{column}`' for column in optional)} must be text")
        yield place, row
    if empty:
        raise ValueError(f"data is {data!r}: its {split} split is empty")


def is_text(value) -> bool:
    """Whether a value is text, which tokenizers read: half of a surrogate pair, "\\ud83d" in JSON, is none."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each line that is not blank.

    Raises:
        ValueError: a line is not JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", parse(line, f"{path}:{number}")


def parse(text: bytes, place: str):
    """The value of a text in JSON."""
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
