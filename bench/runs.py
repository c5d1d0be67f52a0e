"""Runs of the main job for the benchmarks: `python tba.py` with settings, and what its metrics say at the end."""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LAST = 50  # updates that a figure of training is averaged over


def run(root: Path, name: str, *settings: object) -> dict[str, float]:
    """Run tba.py in root/name-..., unless a finished run with these settings is there; its `figures`.

    Raises:
        RuntimeError: the run failed; shows what it printed.
    """
    key = hashlib.sha256(json.dumps([str(each) for each in settings]).encode()).hexdigest()[:8]
    out = root / f"{name}-{key}"
    finished = out / "bench.json"
    if not finished.is_file():
        shutil.rmtree(out, ignore_errors=True)  # what an interrupted benchmark left
        command = [sys.executable, "tba.py", "--out", out.resolve(), *settings]
        done = subprocess.run([*map(str, command)], cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
        finished.write_text(json.dumps(figures(out)) + "\n")
    return json.loads(finished.read_text())


def figures(out: Path) -> dict[str, float]:
    """What a finished run's metrics say.

    Returns:
        The last evaluation's figures by their names (`pass@1`, ...), those before training as `pass@1 before`, ...;
        `kl`, the mean of the last 50 updates' batches, in nats a response; `steps`; `seconds` that training took.
    """
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "loss" in row]
    evaluations = [
        {key.removeprefix("eval/"): value for key, value in row.items() if "eval/" in key}
        for row in rows
        if "eval/pass@1" in row
    ]
    kl = statistics.fmean(row["kl"] for row in updates[-LAST:])
    found = {"kl": kl, "steps": updates[-1]["step"], "seconds": updates[-1]["time"]}
    if evaluations:
        found |= evaluations[-1] | {f"{key} before": value for key, value in evaluations[0].items()}
    return found


def parser(doc: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A command line with --repeats and --json."""
    commands = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands.add_argument("--repeats", type=at_least(1), default=repeats, help="of each measurement")
    commands.add_argument("--json", action="store_true", help="print all figures as one JSON object, last")
    return commands


def show(names: Sequence[str], rows: Iterable[Sequence[str]], figures: dict, as_json: bool) -> None:
    """Print a table, and the figures where they are wanted."""
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
    """For argparse: a whole number that is at least so much."""

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
