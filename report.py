"""Runs as a page, for a browser and from disk: no server, no network.

    python report.py runs/NAME                   writes runs/NAME/report.html; a run writes it too when it ends
    python report.py runs/ONE runs/OTHER         lays them over one another, in runs/report.html
    python report.py runs/* --output all.html

It reads what a run leaves (log.py), also while the run goes on. What it shows and how is in report_page.html; here the
files become the figures of that page. Long runs are thinned: curves to means, samples to some of them.
"""

import argparse
import base64
import hashlib
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
WINDOW_UPDATES = 16  # that a close look at the timeline shows
WINDOW_SPANS = 2000  # at most, in it
GROUPS, SAMPLE_BYTES, CLIP = 200, 4 * 2**20, 2000  # samples: how many, how large together, characters of a text
WORK = ("search", "train", "sync", "evaluate", "save")
PLACES = ("out", "resume", "dry_run")  # settings that say nothing of what was learned


def write(outs: list[Path], page: Path) -> None:
    """Write the page of some runs.

    Raises:
        ValueError: a folder has no run.
        OSError: the page cannot be written.
    """
    runs = [read_run(out) for out in outs]
    names = [name for name in runs[0]["settings"] if name not in PLACES]
    values = {name: [run["settings"][name] for run in runs if name in run["settings"]] for name in names}
    differ = {name: each for name, each in values.items() if len(each) == len(runs) and any(v != each[0] for v in each)}
    unfinished = page.with_name(page.name + ".tmp")
    unfinished.write_text(filled({"runs": runs, "differ": differ}), encoding="utf-8")
    unfinished.replace(page)


def filled(data: dict) -> str:
    """The page with its data. Its scripts are named by their hashes, so that a browser runs no others, and it may load
    nothing: what a model wrote stays text."""
    page = PAGE.read_text(encoding="utf-8")
    start = page.index("<script>") + len("<script>")
    scripts = [plotly(), page[start : page.index("</script>", start)]]
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    parts = {
        "<!-- policy -->": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}",
        "<!-- title -->": html.escape(", ".join(run["name"] for run in data["runs"])),
        "<!-- data -->": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "<!-- plotly -->": f"<script>{scripts[0]}</script>",
    }
    for place, text in parts.items():
        before, after = page.split(place)
        page = before + text + after
    return page


def plotly() -> str:
    """The source of plotly.js, which its Python package ships."""
    (folder,) = importlib.util.find_spec("plotly").submodule_search_locations
    return (Path(folder) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def read_run(out: Path) -> dict:
    """What the page needs of a run.

    Raises:
        ValueError: there is none.
    """
    if not (out / "config.json").is_file():
        raise ValueError(f"{str(out)!r}: it must be the folder of a run, and {out / 'config.json'} does not exist")
    rows = list(read_rows(out / "metrics.jsonl"))
    updates, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "loss" not in row]
    names = dict.fromkeys(name for row in evaluations for name in row if name.startswith("eval/"))
    return {
        "name": out.resolve().name,
        "settings": json.loads((out / "config.json").read_text()),
        "made": updates[-1]["step"] if updates else 0,
        "updates": curves(updates),
        "evaluations": {name: [row.get(name) for row in evaluations] for name in ("step", "time", *names)},
        "timeline": timeline(read_spans(out / "timeline.jsonl")),
        "samples": samples([out / "samples.1.jsonl", out / "samples.jsonl"]),
    }


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file, if it is there, but for a torn one at its end."""
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
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        values = np.array([row.get(name) for row in rows], dtype=float)
        known = ~np.isnan(values)
        edges = np.linspace(0, len(rows), min(POINTS, len(rows)) + 1).astype(int)[:-1]
        count, total = np.add.reduceat(known, edges), np.add.reduceat(np.where(known, values, 0.0), edges)
        found[name] = [float(f"{t / n:.5g}") if n else None for t, n in zip(total, count, strict=True)]
    return found


def read_spans(path: Path) -> dict[str, np.ndarray]:
    """(start, end) [N, 2] of each kind of work, in the order of their starts."""
    found: dict[str, list[tuple[float, float]]] = {what: [] for what in WORK}
    for row in read_rows(path):
        found.setdefault(row["what"], []).append((row["start"], row["end"]))
    return {what: np.array(sorted(spans)).reshape(-1, 2) for what, spans in found.items()}


def timeline(spans: dict[str, np.ndarray]) -> dict:
    """How busy each kind of work was all the time, and some windows to look at closely.

    Returns:
        `seconds`, in all; `busy`, by work the share of each of the bins; `windows`, by name: `start` and `end`, and by
        work the (start, length, lane) of what was under way; of what overlaps each has a lane of its own.
    """
    seconds = max((float(each[:, 1].max()) for each in spans.values() if len(each)), default=0.0)
    edges = np.linspace(0, seconds, BINS + 1)
    busy = {what: [round(share, 3) for share in covered(each, edges)] for what, each in spans.items() if len(each)}
    updates, evaluations = spans["train"], spans["evaluate"][1:-1]  # but the first and the last
    if not len(updates):
        return {"seconds": seconds, "busy": busy, "windows": {}}
    length = WINDOW_UPDATES * float(np.median(np.diff(updates[:, 0]))) if len(updates) > 1 else seconds
    begins = {"as it begins": 0.0, "in the middle": max(0.0, (seconds - length) / 2)}
    if len(evaluations):
        begins["around an evaluation"] = max(0.0, float(evaluations[len(evaluations) // 2, 0]) - length / 3)
    windows = {name: window(spans, begin, min(seconds, begin + length)) for name, begin in begins.items()}
    return {"seconds": seconds, "busy": busy, "windows": windows}


def covered(spans: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of each bin in which at least one of the spans [N, 2], by their starts, was under way.

    >>> covered(np.array([[0.0, 1.0], [0.5, 2.0], [3.0, 4.0]]), np.array([0.0, 2.0, 4.0])).tolist()
    [1.0, 0.5]
    """
    ends = np.maximum.accumulate(spans[:, 1])
    fresh = np.concatenate([[True], spans[1:, 0] > ends[:-1]])  # where a gap is before it
    starts, ends = spans[fresh, 0], ends[np.append(np.flatnonzero(fresh)[1:] - 1, len(spans) - 1)]
    known = np.stack([starts, ends], 1).ravel()
    so_far = np.stack([np.concatenate([[0.0], np.cumsum(ends - starts)[:-1]]), np.cumsum(ends - starts)], 1).ravel()
    return np.diff(np.interp(edges, known, so_far)) / np.maximum(np.diff(edges), 1e-9)


def window(spans: dict[str, np.ndarray], begin: float, end: float) -> dict:
    """What was under way between two moments, as `timeline` returns it."""
    found = {}
    for what, each in spans.items():
        inside = each[(each[:, 0] < end) & (each[:, 1] > begin)][:WINDOW_SPANS]
        free: list[float] = []  # when each lane is
        placed = []
        for start, stop in inside.tolist():
            lane = next((i for i, at in enumerate(free) if at <= start), len(free))
            free[lane : lane + 1] = [stop]
            placed.append((round(start, 4), round(stop - start, 4), lane))
        found[what] = placed
    return {"start": begin, "end": end, "spans": found}


def samples(paths: list[Path]) -> list[dict]:
    """Some of a run's groups, evenly over its time, the first and the last among them; a response that was given
    several times stands once, with their number."""
    places = [(path, place) for path in paths if path.is_file() for place in starts(path)]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    count = min(GROUPS, len(places), max(2, SAMPLE_BYTES * len(places) // max(1, size)))
    found = []
    for i in sorted({round(i) for i in np.linspace(0, len(places) - 1, count)}) if places else []:
        path, place = places[i]
        with path.open("rb") as file:
            file.seek(place)
            group = json.loads(file.readline())
        responses: dict[tuple, dict] = {}
        for response in group["responses"]:
            key = tuple(response.values())
            responses.setdefault(key, response | {"text": clipped(response["text"]), "times": 0})["times"] += 1
        found.append(group | {"prompt": clipped(group["prompt"]), "responses": list(responses.values())})
    return found


def starts(path: Path) -> list[int]:
    """Where the whole lines of a file begin."""
    with path.open("rb") as file:
        ends = np.cumsum([0] + [len(line) for line in file if line.endswith(b"\n")])
    return ends[:-1].tolist()


def clipped(text: str) -> str:
    """The text, or its beginning and how much follows."""
    return text if len(text) <= CLIP else f"{text[:CLIP]} … and {len(text) - CLIP:,} characters more"


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="folders of runs")
    parser.add_argument("--output", type=Path, help="the page; default: OUT/report.html, of several beside them")
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
