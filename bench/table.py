"""The command lines of the benchmarks, and how they print what they measured."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def parser(doc: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A command line with --repeats and --json."""
    commands = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands.add_argument("--repeats", type=at_least(1), default=repeats, help="of each measurement")
    commands.add_argument("--json", action="store_true", help="print all figures as one JSON object, last")
    return commands


def show(names: Sequence[str], rows: Iterable[Sequence[str]], figures: dict, as_json: bool) -> None:
    """Print a table, and the figures too if `as_json`."""
    for cells in (names, ["---"] * len(names), *rows):
        print(f"| {' | '.join(cells)} |")
    if as_json:
        print(json.dumps(figures))


def table(repeats: list[dict[str, float]], as_json: bool) -> None:
    """Print the median and the range of each figure; as JSON the medians, and all under "repeats"."""
    figures = {name: [each[name] for each in repeats] for name in repeats[0]}
    medians = {name: statistics.median(values) for name, values in figures.items()}
    rows = [(name, median_and_range(values)) for name, values in figures.items()]
    show(("figure", f"median of {len(repeats)} (lowest to highest)"), rows, medians | {"repeats": repeats}, as_json)


def at_least(low: int) -> Callable[[str], int]:
    """For argparse: a whole number that is at least `low`."""

    def number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value}: it must be at least {low}")
        return value

    return number


def median_and_range(values: list[float], digits: int = 3) -> str:
    """0.750 (0.730 to 0.760)"""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def reached(values: list[float], digits: int = 3) -> str:
    """Median and range of those that are not nan, and how many they are where not all: 0.5 (0.4 to 0.6), 2 of 3

    >>> reached([0.5, math.nan, 0.7], digits=1), reached([math.nan])
    ('0.6 (0.5 to 0.7), 2 of 3', 'never')
    """
    there = [value for value in values if not math.isnan(value)]
    missed = "" if len(there) == len(values) else f", {len(there)} of {len(values)}"
    return median_and_range(there, digits) + missed if there else "never"
