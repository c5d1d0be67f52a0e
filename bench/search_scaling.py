"""More search at equal updates: does sparse reward gain from it? Countdown with 4 numbers.

    python -m bench.search_scaling              3 seeds, about 20 minutes on 2 cores
    python -m bench.search_scaling --steps 100 --seeds 1 --ratios 1 4
    python -m bench.search_scaling --json       prints, last, the rows as one JSON object

The ratio is responses searched per response trained on: search and training take turns (--strict), S = ratio x K
responses are searched for each of the B prompts, and K of them are trained on. Three ways to choose and use them:

    tb with replay      half the prompts are new, with K of their S responses at random; the other half are any seen,
                        with K of all their stored responses by softmax of the reward
    tb without replay   K of the S responses at random, always new
    grpo                the same, with its own objective

The last two have no use for what they do not train on: K of S at random are as good as K, whatever S. So they are run
at the first ratio alone, and stand for any.

pass@16 is whether any of 16 samples is right; distinct how many different right answers there are among them. Runs are
kept in --out, and one that is there is not made again. Two runs go on at a time: nothing here is a timing.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.runs import at_least, median_and_range, run

PROMPTS, K, LR = 8, 8, 6e-4
METHODS: dict[str, list] = {
    "tb with replay": ["--loss", "tb", "--on-policy-prob", 0.5, "--replay", "reward"],
    "tb without replay": ["--loss", "tb"],
    "grpo": ["--loss", "grpo"],
}


def main() -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=at_least(1), default=200, help="updates of each run")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--ratios", type=at_least(1), nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--eval-prompts", type=at_least(1), default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/search_scaling"))
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    arguments = parser.parse_args()
    ratios = sorted(set(arguments.ratios))

    def ratios_of(method: str) -> list[int]:
        return ratios if "--replay" in METHODS[method] else ratios[:1]

    def job(method: str, ratio: int, seed: int) -> dict:
        result = run(
            arguments.out, f"{method.replace(' ', '-')}-{ratio}x", *METHODS[method], "--numbers", 4, "--strict",
            "--prompts-per-step", PROMPTS, "--responses-per-prompt", K, "--search-responses", ratio * K, "--seed", seed,
            "--steps", arguments.steps, "--lr", LR, "--eval-every", 0, "--eval-samples", 16, "--eval-prompts",
            arguments.eval_prompts,
        )  # fmt: skip
        row = {"method": method, "ratio": ratio, "seed": seed} | result
        print(row, flush=True)
        return row

    cases = [
        (method, ratio, seed)
        for seed in range(arguments.seeds)
        for method in METHODS
        for ratio in reversed(ratios_of(method))
    ]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda case: job(*case), cases))
    base = [row["pass@1 before"] for row in rows if row["method"] == "grpo"]
    print(f"\n{arguments.steps} updates of {PROMPTS} x {K}, {arguments.seeds} seeds: median (lowest to highest)")
    print(f"pass@1 before training: {median_and_range(base)}\n")
    columns = ("pass@1", "greedy", "pass@k", "distinct")
    print(f"| method | searched per trained | {' | '.join(columns).replace('pass@k', 'pass@16')} |")
    print("|---" * (len(columns) + 2) + "|")
    for method in METHODS:
        for ratio in ratios_of(method):
            mine = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
            cells = [median_and_range([row[column] for row in mine]) for column in columns]
            searched = ratio if len(ratios_of(method)) == len(ratios) else "any"
            print(f"| {method} | {searched} | {' | '.join(cells)} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
