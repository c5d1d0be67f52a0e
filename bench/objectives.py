"""Every objective on the same data path, for the same wall-clock: accuracy, diversity and KL on Countdown.

    python -m bench.objectives                      45 seconds of training each, 3 seeds: about 35 minutes on 2 cores
    python -m bench.objectives --lr 3e-4            another learning rate for all
    python -m bench.objectives --losses tb grpo     some of them
    python -m bench.objectives --json               prints, last, the rows as one JSON object

The learning rate falls to 0 over the run, so that a run must know its length in updates: a short run of each objective
first shows how many it makes a second. Runs are kept in --out, and one that is there is not made again.
"""

import argparse
import json
from pathlib import Path

from bench.runs import median_and_range, run
from loss import OBJECTIVES

CASES = {name: ["--loss", name] for name in OBJECTIVES} | {
    "tb_prime, no ratio": ["--loss", "tb_prime", "--no-importance-ratio"],
    "dr_grpo, beta 0": ["--loss", "dr_grpo", "--beta", 0],
}


def main() -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--calibration-steps", type=int, default=100, help="updates of the run that shows the speed")
    parser.add_argument("--eval-prompts", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    arguments = parser.parse_args()
    steps = {}
    for name in arguments.losses:
        slug = name.replace(", ", "-").replace(" ", "-")
        short = run(
            arguments.out / f"{slug}-calibration", *CASES[name], "--steps", arguments.calibration_steps,
            "--eval-prompts", 0,
        )  # fmt: skip
        steps[name] = max(1, round(short["updates_per_s"] * arguments.seconds))
    found: dict[str, list[dict]] = {name: [] for name in arguments.losses}
    for seed in range(arguments.seeds):  # seed by seed, so that the machine's slower minutes meet all alike
        for name in arguments.losses:
            slug = f"{name.replace(', ', '-').replace(' ', '-')}-lr{arguments.lr:g}-{arguments.seconds:g}s-seed{seed}"
            settings = ("--seed", seed, "--steps", steps[name], "--lr", arguments.lr, "--eval-every", 0)
            result = run(arguments.out / slug, *CASES[name], *settings, "--eval-prompts", arguments.eval_prompts)
            found[name].append(result)
            print(f"{slug}: {result}", flush=True)
    print(f"\nlr {arguments.lr:g}, {arguments.seeds} seeds: median (lowest to highest)\n")
    columns = ("pass@1", "greedy", "pass@k", "distinct", "kl")
    print(f"| objective | {' | '.join(columns)} | updates | seconds |")
    print("|---" * (len(columns) + 3) + "|")
    rows = []
    for name, results in found.items():
        cells = [median_and_range([result[column] for result in results]) for column in columns]
        seconds = median_and_range([result["seconds"] for result in results], 0)
        print(f"| {name} | {' | '.join(cells)} | {steps[name]} | {seconds} |")
        rows += [{"loss": name, "seed": seed} | result for seed, result in enumerate(results)]
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
