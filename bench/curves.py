"""Learning curves of finished runs as a table: python -m bench.curves runs/a runs/b [--figure eval/pass@1]"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Print a row for each run: the figure at every evaluation, and the seconds that search and training took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--figure", default="eval/pass@1")
    arguments = parser.parse_args()
    curves, seconds = {}, {}
    for run in arguments.runs:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[run] = {row["step"]: row[arguments.figure] for row in rows if arguments.figure in row}
        seconds[run] = max(row["time"] for row in rows if "loss" in row)
    steps = sorted(set().union(*curves.values()))
    print(f"| {arguments.figure} after updates | " + " | ".join(map(str, steps)) + " | seconds |")
    print("|---" * (len(steps) + 2) + "|")
    for run, curve in curves.items():
        cells = [f"{curve[step]:.3f}" if step in curve else "" for step in steps]
        print(f"| {run.name} | " + " | ".join(cells) + f" | {seconds[run]:.0f} |")


if __name__ == "__main__":
    main()
