"""Every objective on the same data path, for the same wall-clock: accuracy, diversity and KL on Countdown.

    python -m bench.objectives                      30 seconds of training each, 3 seeds: about 30 minutes on 2 cores
    python -m bench.objectives --lr 3e-4            another learning rate for all
    python -m bench.objectives --losses tb grpo     some of them
    python -m bench.objectives --json               prints, last, the rows as one JSON object

The learning rate falls to 0 over that time. `kl` is the mean of log pi - log pi_ref over the batches of the last 50
updates, in nats a response: the learning rate is almost 0 by then, so that they are near to samples of the final
policy. Runs are kept in --out, and one that is there is not made again.
"""

import argparse
import json
from pathlib import Path

from bench.runs import at_least, median_and_range, run
from loss import OBJECTIVES

MOST = 1_000_000  # updates: time ends a run
CASES: dict[str, list] = {name: ["--loss", name] for name in OBJECTIVES} | {
    "tb_prime_no_ratio": ["--loss", "tb_prime", "--no-importance-ratio"],
    "dr_grpo_beta_0": ["--loss", "dr_grpo", "--beta", 1e-9],  # at 0 itself there is no reference, and no KL
    "cispo_beta_0": ["--loss", "cispo", "--beta", 1e-9],
}
COLUMNS = ("pass@1", "greedy", "pass@k", "distinct", "kl")


def main() -> None:
    """Run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=at_least(1), default=30, help="of training")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--losses", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--eval-prompts", type=at_least(1), default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):  # seed by seed, so that the machine's slower minutes meet all alike
        settings: tuple = ("--seed", seed, "--lr", arguments.lr, "--steps", MOST, "--max-seconds", arguments.seconds)
        settings += ("--eval-every", 0, "--eval-prompts", arguments.eval_prompts)
        for name in arguments.losses:
            found = run(arguments.out, name, *CASES[name], *settings)
            rows.append({"loss": name, "seed": seed} | found)
            print(rows[-1], flush=True)
    print(f"\nlr {arguments.lr:g}, {arguments.seeds} seeds: median (lowest to highest)\n")
    print(f"| objective | {' | '.join(COLUMNS)} | updates | seconds |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for name in arguments.losses:
        mine = [row for row in rows if row["loss"] == name]
        cells = [median_and_range([row[column] for row in mine]) for column in COLUMNS]
        cells += [median_and_range([row[column] for row in mine], 0) for column in ("steps", "seconds")]
        print(f"| {name} | {' | '.join(cells)} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
