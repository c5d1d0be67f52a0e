"""Runs of the main job for the benchmarks: `python tba.py` with settings, and what its metrics say at the end."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LAST = 50  # updates that a figure of training is averaged over


def run(out: Path, *settings: object) -> dict[str, float]:
    """Run tba.py, unless the folder holds that run already.

    Returns:
        The last evaluation's figures by their names (`pass@1`, ...), those before training as `pass@1 before`, ...;
        `kl`, the mean of the last 50 updates, in nats a response; `steps`; `seconds` that search and training took;
        `updates_per_s`, without the first tenth of the updates.

    Raises:
        RuntimeError: the run failed; shows what it printed.
    """
    if not (out / "model").is_dir():
        command = [sys.executable, "tba.py", "--out", out, *settings]
        done = subprocess.run([*map(str, command)], cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates, evaluations = ([row for row in rows if name in row] for name in ("loss", "eval/pass@1"))
    figures = {name.removeprefix("eval/"): row for name, row in (evaluations or [{}])[-1].items() if "eval/" in name}
    before = (evaluations or [{}])[0].items()
    figures |= {f"{name.removeprefix('eval/')} before": row for name, row in before if "eval/" in name}
    first = updates[len(updates) // 10]
    rate = (updates[-1]["step"] - first["step"]) / (updates[-1]["time"] - first["time"])
    kl = statistics.fmean(row["kl"] for row in updates[-LAST:])
    return figures | {"kl": kl, "steps": len(updates), "seconds": updates[-1]["time"], "updates_per_s": rate}


def median_and_range(values: list[float], digits: int = 3) -> str:
    """0.75 (0.73 to 0.76)"""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
