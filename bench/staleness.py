"""What does the age of the data cost an objective, and how many different right answers does it keep? Countdown.

    python -m bench.staleness             5 seeds, an hour on 2 cores; draws docs/staleness.png and docs/diversity.png
    python -m bench.staleness --seeds 1 --ages 1 64 --losses tb dr_grpo
    python -m bench.staleness --json      prints, last, the rows as one JSON object

Settings of tba.py may follow.

Every run makes the same number of updates of 16 x 8 responses, at the same learning rate, which falls to 0. A batch is
searched by the policy as it is and trained on so many updates later, as if the engines' weights were so old; the first
ones are all of the model that the run starts from. Two runs go on at a time, each on half of the cores: nothing here is
a timing.

Test problems are the same 64 for all, with 64 samples each. pass@k is the unbiased estimate (arXiv 2107.03374,
equation 1), `distinct` the number of different right answers among 8 samples. A cell is the median over the seeds
(lowest to highest).
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import Queue, get_context
from pathlib import Path

from tqdm import tqdm

import tasks
from bench.session import session
from bench.table import PROJECT, at_least, median_and_range, reached, show
from buffer import Group
from tasks import Answered
from tba import TBA

LOSSES = {
    "tb": ("tb", "0.03"),
    "tb_tapered": ("tb_tapered", "0.03"),
    "dr_grpo": ("dr_grpo", "0.03"),
    "dr_grpo, beta 0": ("dr_grpo", "0"),
}  # the objective, and its beta
AGES, UPDATES, LR = (1, 4, 16, 64), 200, "3e-4"
B, K = 16, 8
PROBLEMS, SAMPLES, KS, PER_DISTINCT = 64, 64, (1, 4, 16, 64), 8
LEVELS = (0.4, 0.5, 0.6)  # pass@1 at which diversity is compared
FRONTIER = ("pass@1", "distinct")


async def run(loss: str, age: int, seed: int, updates: int, settings: Sequence[str]) -> list[dict[str, float]]:
    """Figures of the policy on the test problems, before training and after each quarter of it."""
    name, beta = LOSSES[loss]
    same = [
        *("--loss", name, "--beta", beta, "--lr", LR, "--lr-schedule", "linear", "--seed", str(seed)),
        *("--prompts-per-step", str(B), "--responses-per-prompt", str(K), "--search-responses", str(K)),
        *("--eval-prompts", str(PROBLEMS), "--eval-samples", str(SAMPLES)),
    ]
    async with session(*same, *settings) as here:
        schedules = replace(here.config, steps=updates)
        waiting, rows = deque[list[Group]](), [await examine(here, 0)]
        for step in range(updates):
            while len(waiting) <= age:
                rollouts = (here.rollout(next(here.sampler)) for _ in range(B))
                waiting.append(await asyncio.gather(*rollouts))
                for group in waiting[-1]:
                    here.sampler.done(group.prompt_id)
            await here.in_trainer(here.trainer.update, waiting.popleft(), **schedules.schedule(step, 0.0))
            here.progress.step += 1
            await here.sync(await here.stage())
            if (step + 1) * 4 % updates < 4:
                rows.append(await examine(here, step + 1))
        return rows


async def examine(here: TBA, step: int) -> dict[str, float]:
    """pass@k and distinct right answers of the policy that the engines have."""
    room = asyncio.Semaphore(max(1, here.searcher.slots // SAMPLES))
    answers = await asyncio.gather(*(here.answer(prompt, room) for prompt in here.setup.test_prompts))
    return {"step": step} | figures(answers)


def figures(answers: list[Answered]) -> dict[str, float]:
    """`pass@k` for each of KS, and `distinct`: different right answers among 8 samples.

    The probability that none of k samples without replacement is right: C(n - c, k) / C(n, k), of c right among n.
    """
    right = [[sample.reward > 0 for sample in each.samples] for each in answers]
    found: dict[str, float] = {}
    for k in KS:
        none = [math.comb(len(each) - sum(each), k) / math.comb(len(each), k) for each in right]
        found[f"pass@{k}"] = 1 - statistics.fmean(none)
    some = [
        replace(each, samples=each.samples[i : i + PER_DISTINCT])
        for each in answers
        for i in range(0, len(each.samples), PER_DISTINCT)
    ]
    return found | {"distinct": tasks.accuracy(some)["distinct"]}


def confine(halves: Queue) -> None:
    """Confine a worker process, and the engines that it starts, to a half of the cores."""
    os.sched_setaffinity(0, halves.get())


def job(loss: str, age: int, seed: int, *others) -> list[dict]:
    """A run; each row says of which."""
    return [{"loss": loss, "age": age, "seed": seed} | row for row in asyncio.run(run(loss, age, seed, *others))]


def main(arguments: list[str] | None = None) -> None:
    """Run, print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--ages", type=at_least(0), nargs="+", default=list(AGES), help="of the data, in updates")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="NAME")
    parser.add_argument("--updates", type=at_least(4), default=UPDATES)
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    parser.add_argument("--pictures", type=Path, default=PROJECT / "docs", help="folder where they are drawn")
    wanted, settings = parser.parse_known_args(arguments)
    # Seed by seed, so that the machine's slower minutes meet all alike.
    cases = [(loss, age, seed) for seed in range(wanted.seeds) for loss in wanted.losses for age in wanted.ages]
    cores, halves = sorted(os.sched_getaffinity(0)), get_context("spawn").Queue()
    for half in (cores[::2], cores[1::2] or cores):
        halves.put(set(half))
    with ProcessPoolExecutor(2, get_context("spawn"), confine, (halves,)) as pool:
        jobs = [pool.submit(job, *case, wanted.updates, settings) for case in cases]
        for _ in tqdm(as_completed(jobs), total=len(jobs), unit="run", mininterval=5):
            pass
    rows = [row for each in jobs for row in each.result()]
    show_age(rows, wanted)
    show_diversity(rows, wanted)
    draw(rows, wanted)
    if wanted.json:
        print(json.dumps({"rows": rows}))


def final(rows: list[dict], loss: str, age: int) -> list[float]:
    """pass@1 after the last update, of each seed."""
    mine = [row for row in rows if (row["loss"], row["age"]) == (loss, age)]
    last = max(row["step"] for row in mine)
    return [row["pass@1"] for row in mine if row["step"] == last]


def at_level(rows: list[dict], level: float, figure: str) -> float:
    """A figure of one run where its pass@1 first reached a level, between two examinations; nan where it never did."""
    for before, after in itertools.pairwise(rows):
        if before["pass@1"] < level <= after["pass@1"]:
            share = (level - before["pass@1"]) / (after["pass@1"] - before["pass@1"])
            return before[figure] + share * (after[figure] - before[figure])
    return math.nan


def show_age(rows: list[dict], wanted: argparse.Namespace) -> None:
    """Print pass@1 after the last update by the age of the data."""
    cells = [[loss, *(median_and_range(final(rows, loss, age)) for age in wanted.ages)] for loss in wanted.losses]
    print(f"\npass@1 after {wanted.updates} updates\n")
    show(("--loss", *(f"{age} updates old" for age in wanted.ages)), cells, {}, as_json=False)


def show_diversity(rows: list[dict], wanted: argparse.Namespace) -> None:
    """Print distinct right answers and pass@64 where pass@1 reached each level, over all ages and seeds."""
    for figure in ("distinct", f"pass@{KS[-1]}"):
        cells = []
        for loss in wanted.losses:
            runs = [
                [row for row in rows if (row["loss"], row["age"], row["seed"]) == (loss, age, seed)]
                for age in wanted.ages
                for seed in range(wanted.seeds)
            ]
            cells.append([loss, *(reached([at_level(each, level, figure) for each in runs]) for level in LEVELS)])
        print(f"\n{figure} where pass@1 is\n")
        show(("--loss", *map(str, LEVELS)), cells, {}, as_json=False)


def draw(rows: list[dict], wanted: argparse.Namespace) -> None:
    """Pass@1 against age; distinct right answers against pass@1 as training goes on. A line an objective."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = {name: pyplot.subplots(figsize=(7, 4)) for name in ("staleness", "diversity")}
    age_axes, diversity_axes = (axes for _, axes in pictures.values())
    for i, loss in enumerate(wanted.losses):
        style = {"color": f"C{i}", "marker": "o", "linewidth": 2.5 if loss.startswith("tb") else 1.2, "label": loss}
        ends = [final(rows, loss, age) for age in wanted.ages]
        places = [place + 0.03 * i for place in range(len(ends))]
        age_axes.plot(places, [statistics.median(values) for values in ends], **style)
        age_axes.vlines(places, [min(values) for values in ends], [max(values) for values in ends], color=f"C{i}")
        steps = sorted({row["step"] for row in rows})
        examined = [[row for row in rows if (row["loss"], row["step"]) == (loss, step)] for step in steps]
        middle = ([statistics.median(row[name] for row in each) for each in examined] for name in FRONTIER)
        diversity_axes.plot(*middle, **style)
    age_axes.set_xticks(range(len(wanted.ages)), [str(age) for age in wanted.ages])
    age_axes.set(xlabel="age of the data, updates", ylabel=f"pass@1 after {wanted.updates} updates")
    diversity_axes.set(xlabel="pass@1", ylabel=f"different right answers among {PER_DISTINCT}")
    for name, (figure, axes) in pictures.items():
        axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(wanted.pictures / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
