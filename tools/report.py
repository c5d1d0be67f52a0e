"""Runs as a page that a browser opens from disk: no server, no network.

    python -m tools.report runs/NAME                   writes runs/NAME/report.html, as a run does when it ends
    python -m tools.report runs/ONE runs/OTHER         compares runs, in runs/report.html
    python -m tools.report runs/* --output all.html

It reads the files of a run (run/metrics.py), also while the run goes on. report_page.html draws what this file computes
from them. Long runs are thinned: curves to means, samples to a selection.
"""

import argparse
import html
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PAGE = Path(__file__).with_name("report_page.html")
POINTS = 400  # of a curve
BINS = 240  # of the time in which each kind of work is counted
WINDOW_UPDATES = 16  # in a close look at the timeline
WINDOW_SPANS = 2000  # at most, in it
GROUPS, SAMPLE_BYTES, CLIP = 200, 4 * 2**20, 2000  # samples: number, total size, characters of a text
WORK = ("search", "train", "sync", "evaluate", "save")
NOT_COMPARED = ("out", "resume", "dry_run")  # settings without influence on what is learned


def write(outs: list[Path], page: Path) -> None:
    """Write the page of the runs in these folders.

    Raises:
        ValueError: a folder has no run.
        OSError: the page cannot be written.
    """
    runs = [read_run(out) for out in outs]
    names = [name for name in runs[0]["settings"] if name not in NOT_COMPARED]
    values = {name: [run["settings"][name] for run in runs if name in run["settings"]] for name in names}
    differ = {name: each for name, each in values.items() if len(each) == len(runs) and any(v != each[0] for v in each)}
    # What a model wrote cannot end the element that holds the data, and the page shows it by textContent alone.
    data = json.dumps({"runs": runs, "differ": differ}, allow_nan=False).replace("<", "\\u003c")
    (plotly,) = importlib.util.find_spec("plotly").submodule_search_locations
    script = (Path(plotly) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    parts = {"title": html.escape(", ".join(run["name"] for run in runs)), "data": data, "plotly": script}
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, after = text.split(f"<!-- {name} -->")
        text = before + part + after
    unfinished = page.with_name(page.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(page)


def read_run(out: Path) -> dict:
    """The data of a run that the page shows.

    Raises:
        ValueError: the folder has no run.
    """
    if not (out / "config.json").is_file():
        raise ValueError(f"{str(out)!r}: it must be the folder of a run, and {out / 'config.json'} does not exist")
    rows = list(read_rows(out / "metrics.jsonl"))
    updates, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
    names = dict.fromkeys(name for row in evaluations for name in row if name.startswith("eval/"))
    return {
        "name": out.resolve().name,
        "settings": json.loads((out / "config.json").read_text()),
        "steps": updates[-1]["step"] if updates else 0,
        "updates": curves(updates),
        "evaluations": {name: [row.get(name) for row in evaluations] for name in ("step", "time", *names)},
        "timeline": timeline(read_spans(out / "timeline.jsonl")),
        "samples": samples([out / "samples.1.jsonl", out / "samples.jsonl"]),
    }


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file, without an incomplete last one; none where there is no such file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return


def curves(rows: list[dict]) -> dict[str, list[float | None]]:
    """Figures of updates by name, thinned to means; None where there is none.

    >>> curves([{"step": 1, "kl": 1.0}, {"step": 2, "kl": None}])
    {'step': [1.0, 2.0], 'kl': [1.0, None]}
    """
    thinned = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row.get(name) for row in rows], dtype=float)
        known = ~np.isnan(values)
        edges = np.linspace(0, len(rows), min(POINTS, len(rows)) + 1).astype(int)[:-1]
        count, total = np.add.reduceat(known, edges), np.add.reduceat(np.where(known, values, 0.0), edges)
        thinned[name] = [float(f"{t / n:.5g}") if n else None for t, n in zip(total, count, strict=True)]
    return thinned


def read_spans(path: Path) -> dict[str, np.ndarray]:
    """(start, end) [N, 2] of the spans of each kind of work, ordered by start."""
    spans: dict[str, list[tuple[float, float]]] = {what: [] for what in WORK}
    for row in read_rows(path):
        spans.setdefault(row["what"], []).append((row["start"], row["end"]))
    return {what: np.array(sorted(each)).reshape(-1, 2) for what, each in spans.items()}


def timeline(spans: dict[str, np.ndarray]) -> dict:
    """How busy each kind of work was over time, and some windows for a close look.

    Returns:
        `seconds`, in all; `busy`, by work the busy share of each bin; `windows`, by name what `window` returns.
    """
    seconds = max((float(each[:, 1].max()) for each in spans.values() if len(each)), default=0.0)
    edges = np.linspace(0, seconds, BINS + 1)
    busy = {what: [round(share, 3) for share in covered(each, edges)] for what, each in spans.items() if len(each)}
    updates, evaluations = spans["train"], spans["evaluate"][1:-1]  # without the first and the last
    if not len(updates):
        return {"seconds": seconds, "busy": busy, "windows": {}}
    length = WINDOW_UPDATES * float(np.median(np.diff(updates[:, 0]))) if len(updates) > 1 else seconds
    starts = {"as it begins": 0.0, "in the middle": max(0.0, (seconds - length) / 2)}
    if len(evaluations):
        starts["around an evaluation"] = max(0.0, float(evaluations[len(evaluations) // 2, 0]) - length / 3)
    windows = {name: window(spans, start, min(seconds, start + length)) for name, start in starts.items()}
    return {"seconds": seconds, "busy": busy, "windows": windows}


def covered(spans: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of each bin that is covered by at least one of the spans [N, 2], ordered by start.

    >>> covered(np.array([[0.0, 1.0], [0.5, 2.0], [3.0, 4.0]]), np.array([0.0, 2.0, 4.0])).tolist()
    [1.0, 0.5]
    """
    ends = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate([[True], spans[1:, 0] > ends[:-1]])  # of a stretch without gaps
    starts, ends = spans[first, 0], ends[np.append(np.flatnonzero(first)[1:] - 1, len(spans) - 1)]
    seconds = np.cumsum(ends - starts)  # covered up to each end
    at, so_far = np.stack([starts, ends], 1).ravel(), np.stack([seconds - (ends - starts), seconds], 1).ravel()
    return np.diff(np.interp(edges, at, so_far)) / np.maximum(np.diff(edges), 1e-9)


def window(spans: dict[str, np.ndarray], start: float, end: float) -> dict:
    """`start`, `end`, and by work the (start, length, lane) of its `spans` in between; those that overlap have lanes of
    their own."""
    placed: dict[str, list] = {}
    for what, each in spans.items():
        free: list[float] = []  # by lane, from when on
        placed[what] = []
        for begin, stop in each[(each[:, 0] < end) & (each[:, 1] > start)][:WINDOW_SPANS].tolist():
            lane = next((i for i, at in enumerate(free) if at <= begin), len(free))
            free[lane : lane + 1] = [stop]
            placed[what].append((round(begin, 4), round(stop - begin, 4), lane))
    return {"start": start, "end": end, "spans": placed}


def samples(paths: list[Path]) -> list[dict]:
    """A selection of a run's groups, evenly over its time, the first and the last among them; equal responses of a
    group stand once, with their number."""
    places = [(path, place) for path in paths if path.is_file() for place in line_starts(path)]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    count = min(GROUPS, len(places), max(2, SAMPLE_BYTES * len(places) // max(1, size)))
    groups = []
    for i in sorted({round(i) for i in np.linspace(0, len(places) - 1, count)}) if places else []:
        path, place = places[i]
        with path.open("rb") as file:
            file.seek(place)
            group = json.loads(file.readline())
        responses: dict[tuple, dict] = {}
        for response in group["responses"]:
            new = response | {"text": clipped(response["text"]), "times": 0}
            responses.setdefault(tuple(response.values()), new)["times"] += 1
        groups.append(group | {"prompt": clipped(group["prompt"]), "responses": list(responses.values())})
    return groups


def line_starts(path: Path) -> list[int]:
    """Offsets of a file's complete lines."""
    with path.open("rb") as file:
        return np.cumsum([0] + [len(line) for line in file if line.endswith(b"\n")])[:-1].tolist()


def clipped(text: str) -> str:
    """The text, or its beginning and how much follows."""
    return text if len(text) <= CLIP else f"{text[:CLIP]} … and {len(text) - CLIP:,} characters more"


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="folders of runs")
    parser.add_argument("--output", type=Path, help="the page; default: OUT/report.html, of several runs beside them")
    arguments = parser.parse_args()
    first = arguments.runs[0]
    page = arguments.output or (first if len(arguments.runs) == 1 else first.resolve().parent) / "report.html"
    try:
        write(arguments.runs, page)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{page}: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
