"""Runs of tba.py side by side on Countdown, and what they have reached: a row for each setting.

    python -m bench.sweep objectives            every objective, 30 seconds of training each: 30 minutes on 2 cores
    python -m bench.sweep search                more search at equal updates, where rewards are sparse: 30 minutes
    python -m bench.sweep curves runs/NAME ...  learning curves of finished runs; --figure eval/greedy: another figure;
                                                --picture FILE.png: drawn too

Flags: --seeds 3, --eval-prompts, --out (runs are kept there, and one that is there is not made again), --json (prints,
last, the rows as one JSON object). A cell is the median over the seeds (lowest to highest), on held-out problems.

objectives --losses tb grpo --seconds 30 --lr 1e-4
    All have the same data path and the same wall-clock, over which the learning rate falls to 0. `kl` is the mean of
    log pi - log pi_ref over the batches of the last 50 updates, in nats a response: the learning rate is almost 0 by
    then, so that they are near to samples of the final policy.

search --ratios 1 4 16 --steps 64
    bench/hard_task.py: 64 prompts with 4 numbers, of which the embedded model gets 1 in 170 right. The ratio is
    responses searched per response trained on: search and training take turns (--strict), ratio x K responses are
    generated for each of the B prompts, and K of them are trained on. "tb_tapered, softmax": half the prompts are new,
    with K of their responses at random; the other half are any seen, with K of all their stored responses by softmax of
    the reward. "tb_tapered, best and worst": all prompts are any seen, with the K/2 best and the K/2 worst of all their
    stored responses. "grpo" is on-policy: at ratio 1 with as many updates, and, "as many responses", with ratio times
    the updates instead, so that it has searched as much. `pass@k` is whether any of 16 samples is right. Two runs go on
    at a time: nothing here is a timing.
"""

import argparse
import hashlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.table import PROJECT, at_least, median_and_range, show
from loss import OBJECTIVES

ENDLESS = 1_000_000  # updates: time ends a run
LAST = 50  # updates that `kl` is averaged over
LOSSES: dict[str, list] = {name: ["--loss", name] for name in OBJECTIVES} | {
    "tb_prime_no_ratio": ["--loss", "tb_prime", "--no-importance-ratio"],
    "dr_grpo_beta_0": ["--loss", "dr_grpo", "--beta", 1e-9],  # at 0 itself there is no reference, and no KL
    "cispo_beta_0": ["--loss", "cispo", "--beta", 1e-9],
}
REPLAYS = {  # of the search sweep
    "softmax": ["--on-policy-prob", 0.5, "--replay", "reward"],
    "best and worst": ["--on-policy-prob", 0, "--replay", "examples/best_and_worst.py:best_and_worst"],
}
B, K = 8, 8  # of the search sweep
COLUMNS = {"pass@1": 3, "greedy": 3, "pass@k": 3, "distinct": 3, "kl": 3, "steps": 0, "seconds": 0}  # digits


def objectives(wanted: argparse.Namespace) -> dict[str, list]:
    """The settings of each case, by its name."""
    same = ["--steps", ENDLESS, "--max-seconds", wanted.seconds, "--lr", wanted.lr]
    return {name: [*LOSSES[name], *same] for name in wanted.losses}


def search(wanted: argparse.Namespace) -> dict[str, list]:
    """The settings of each case, by its name."""
    same = ["--task", "bench/hard_task.py", "--strict", "--lr", 6e-4, "--eval-samples", 16]
    same += ["--prompts-per-step", B, "--responses-per-prompt", K]
    replay = ["--loss", "tb_tapered", "--evict", "lowest_reward", *same]
    ratios, cases = sorted(set(wanted.ratios)), dict[str, list]()
    for (name, settings), ratio in itertools.product(REPLAYS.items(), ratios):
        searched = ["--search-responses", ratio * K, "--steps", wanted.steps]
        cases[f"tb_tapered, {name} {ratio}x"] = [*replay, *settings, *searched]
    for ratio in ratios:
        updates = ["--search-responses", K, "--steps", ratio * wanted.steps]
        cases["grpo 1x" if ratio == 1 else f"grpo {ratio}x, as many responses"] = ["--loss", "grpo", *same, *updates]
    return cases


def run(root: Path, name: str, settings: list) -> dict[str, float]:
    """Run tba.py in root/name-..., unless a finished run with these settings is there; its `figures`.

    Raises:
        RuntimeError: the run failed; shows what it printed.
    """
    key = hashlib.sha256(json.dumps([str(each) for each in settings]).encode()).hexdigest()[:8]
    out = root / f"{name.replace(' ', '-')}-{key}"
    finished = out / "bench.json"
    if not finished.is_file():
        shutil.rmtree(out, ignore_errors=True)  # what an interrupted benchmark left
        command = [*map(str, (sys.executable, "tba.py", "--out", out.resolve(), *settings))]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        finished.write_text(json.dumps(figures(out)) + "\n")
    return json.loads(finished.read_text())


def figures(out: Path) -> dict[str, float]:
    """What a finished run's metrics say.

    Returns:
        The last evaluation's figures by their names (`pass@1`, ...), those before training as `pass@1 before`, ...;
        `kl`, the mean of the last 50 updates' batches, in nats a response; `steps`; `seconds` that training took.
    """
    rows = metrics(out)
    updates = [row for row in rows if "loss" in row]
    first, *_, last = [row for row in rows if "loss" not in row]
    found = {"kl": statistics.fmean(row["kl"] for row in updates[-LAST:])}
    found |= {"steps": updates[-1]["step"], "seconds": updates[-1]["time"]}
    for row, when in ((first, " before"), (last, "")):
        found |= {name.removeprefix("eval/") + when: value for name, value in row.items() if "eval/" in name}
    return found


def metrics(out: Path) -> list[dict]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sweep(cases: dict[str, list], wanted: argparse.Namespace, at_a_time: int) -> None:
    """Run all cases, print the table."""

    def job(seed: int, name: str) -> dict:
        last = ["--seed", seed, "--eval-every", 0, "--eval-prompts", wanted.eval_prompts]
        row = {"case": name, "seed": seed} | run(wanted.out, name, [*cases[name], *last])
        print(row, flush=True)
        return row

    # Seed by seed, so that the machine's slower minutes meet all alike.
    seeds, names = zip(*((seed, name) for seed in range(wanted.seeds) for name in cases), strict=True)
    with ThreadPoolExecutor(at_a_time) as pool:
        rows = list(pool.map(job, seeds, names))
    print(f"\npass@1 before training: {median_and_range([row['pass@1 before'] for row in rows])}\n")
    cells = []
    for name in cases:
        mine = [row for row in rows if row["case"] == name]
        cells.append([name, *(median_and_range([row[each] for row in mine], n) for each, n in COLUMNS.items())])
    show(("case", *COLUMNS), cells, {"rows": rows}, wanted.json)


def curves(wanted: argparse.Namespace) -> None:
    """Print a row for each run: the figure at every evaluation, and the seconds that training took; draw them."""
    rows = {out: metrics(out) for out in wanted.runs}
    curve = {out: {row["step"]: row[wanted.figure] for row in rows[out] if wanted.figure in row} for out in rows}
    steps = sorted(set().union(*curve.values()))
    cells = []
    for out in rows:
        points = (f"{curve[out][step]:.3f}" if step in curve[out] else "" for step in steps)
        seconds = max(row["time"] for row in rows[out] if "loss" in row)
        cells.append([out.name, *points, f"{seconds:.0f}"])
    show((f"{wanted.figure} after updates", *map(str, steps), "seconds"), cells, {}, as_json=False)
    if wanted.picture:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4))
        for out, by_step in curve.items():
            axes.plot(list(by_step), list(by_step.values()), marker="o", label=out.name)
        axes.set(xlabel="updates", ylabel=wanted.figure.removeprefix("eval/"), ylim=(0, None))
        axes.legend() if len(curve) > 1 else None
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(wanted.picture, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, eval_prompts in (("objectives", 400), ("search", 64)):
        command = commands.add_parser(name)
        command.add_argument("--seeds", type=at_least(1), default=5)
        command.add_argument("--eval-prompts", type=at_least(1), default=eval_prompts)
        command.add_argument("--out", type=Path, default=Path("runs/sweep"))
        command.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
        if name == "objectives":
            command.add_argument("--seconds", type=at_least(1), default=30, help="of training")
            command.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="NAME")
            command.add_argument("--lr", type=float, default=1e-4)
        else:
            command.add_argument("--steps", type=at_least(1), default=64, help="updates of each run")
            command.add_argument("--ratios", type=at_least(1), nargs="+", default=[1, 4, 16])
    command = commands.add_parser("curves")
    command.add_argument("runs", nargs="+", type=Path)
    command.add_argument("--figure", default="eval/pass@1")
    command.add_argument("--picture", type=Path, help="where they are drawn")
    wanted = parser.parse_args(arguments)
    if wanted.command == "objectives":
        sweep(objectives(wanted), wanted, at_a_time=1)
    elif wanted.command == "search":
        sweep(search(wanted), wanted, at_a_time=2)
    else:
        curves(wanted)


if __name__ == "__main__":
    main()
