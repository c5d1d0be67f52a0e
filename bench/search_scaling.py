"""More search at equal updates: does sparse reward gain from it? Countdown with 4 numbers.

    python -m bench.search_scaling              3 seeds, about 40 minutes on 2 cores
    python -m bench.search_scaling --steps 100 --seeds 1 --ratios 1 4
    python -m bench.search_scaling --json       prints, last, the rows as one JSON object

The ratio is responses searched per response trained on: search and training take turns (--strict), S = ratio x K
responses are searched for each of the B prompts, and K of them are trained on. Three ways to choose and use them:

    tb with replay      half the prompts are new, with K of their S responses at random; the other half are any seen,
                        with K of all their stored responses by softmax of the reward
    tb without replay   K of the S responses at random, always new
    grpo                the same, with its own objective

pass@16 is whether any of 16 samples is right; distinct how many different right answers there are among them. Runs are
kept in --out, and one that is there is not made again. Two runs go on at a time: nothing here is a timing.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.runs import median_and_range, run

PROMPTS, K = 8, 8
METHODS = {
    "tb with replay": ["--loss", "tb", "--on-policy-prob", 0.5, "--replay", "reward"],
    "tb without replay": ["--loss", "tb"],
    "grpo": ["--loss", "grpo"],
}


def main() -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--eval-prompts", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/search_scaling"))
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    arguments = parser.parse_args()

    def job(method: str, ratio: int, seed: int) -> dict:
        slug = f"{method.replace(' ', '-')}-{ratio}x-{arguments.steps}-seed{seed}"
        result = run(
            arguments.out / slug, "--numbers", 4, "--strict", *METHODS[method], "--prompts-per-step", PROMPTS,
            "--responses-per-prompt", K, "--search-responses", ratio * K, "--steps", arguments.steps, "--seed", seed,
            "--eval-every", 0, "--eval-samples", 16, "--eval-prompts", arguments.eval_prompts,
        )  # fmt: skip
        print(f"{slug}: {result}", flush=True)
        return {"method": method, "ratio": ratio, "seed": seed} | result

    cases = [
        (method, ratio, seed) for seed in range(arguments.seeds) for ratio in arguments.ratios for method in METHODS
    ]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda case: job(*case), cases))
    base = [row["pass@1 before"] for row in rows if row["method"] == "grpo" and row["ratio"] == arguments.ratios[0]]
    print(f"\n{arguments.steps} updates of {PROMPTS} x {K}, {arguments.seeds} seeds: median (lowest to highest)")
    print(f"pass@1 before training: {median_and_range(base)}\n")
    columns = ("pass@1", "greedy", "pass@k", "distinct")
    print(f"| method | searched per trained | {' | '.join(columns).replace('pass@k', 'pass@16')} |")
    print("|---" * (len(columns) + 2) + "|")
    for method in METHODS:
        for ratio in arguments.ratios:
            mine = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
            cells = [median_and_range([row[column] for row in mine]) for column in columns]
            print(f"| {method} | {ratio} | {' | '.join(cells)} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
