"""Which trains sooner to the same accuracy, this or TRL's GRPOTrainer? Countdown, from the same warmed-up models.

    python -m bench.vs_trl                      seeds 0 to 4: about 12 minutes on 2 cores
    python -m bench.vs_trl --seconds 20         of training, in which learning rates fall to 0 (30)
    python -m bench.vs_trl --only tba --lr 2e-4               one side alone; other settings of tba.py for ours
    python -m bench.vs_trl --trl '{"learning_rate": 2e-4}'    and of GRPOConfig for TRL's
    python -m bench.vs_trl --speed              for a GPU: responses a second, on the lengths of GSM8K and TL;DR
    python -m bench.vs_trl --json               prints, last, all figures as one JSON object

The sides: "tba", ours with trajectory balance; "dr_grpo", ours with TRL's objective; "trl", in .venv-trl, which is made
at first. Each uses both cores as it sees fit, and has a clock of training: from when search begins, without loading,
compiling and evaluating. Every half second the policy is set aside; afterwards each is asked for 8 responses to each of
400 held-out problems. What counts is the first policy from which on five in a row have a pass@1 of 0.50, or of 0.65, so
that who learns fast and stalls is seen; `distinct` is how many different right answers it gives a problem. The settings
of "tba" and "trl" are the best of as many tried: docs/measurements.md. A cell is the median over the seeds (lowest to
highest).

With --speed a Llama of 1.1B with random weights (--size for another) is trained on 7 x 20 responses at a time, by TRL
with vLLM colocated: `ours` and `trl` are the responses that are searched and trained on in a second.
"""

import argparse
import asyncio
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks
from bench.lengths_task import folder
from bench.session import searching, session, train, training
from bench.table import PROJECT, at_least, parser, reached, show, table
from buffer import Response
from run.cli import parse
from tasks import countdown

OURS = (
    *("--steps", "1000000", "--lr-schedule", "linear"),  # to 0 at --max-seconds
    *("--prompts-per-step", "16", "--responses-per-prompt", "8", "--search-responses", "8"),
    *("--sync-every", "1", "--on-policy-prob", "1", "--prime", "128"),
)
LOSSES = {
    "tba": ("--loss", "tb_tapered", "--lr", "6e-4", "--beta", "0.03"),
    "dr_grpo": ("--loss", "dr_grpo", "--lr", "6e-4", "--beta", "0"),
}
TRL = dict(
    temperature=1.0, loss_type="dr_grpo", scale_rewards="none", beta=0.0, lr_scheduler_type="constant",
    weight_decay=0.0, gradient_checkpointing=False,
)  # fmt: skip
ON_COUNTDOWN = TRL | dict(
    per_device_train_batch_size=256, num_generations=16, max_completion_length=13, use_cpu=True, bf16=False,
    learning_rate=1e-3, lr_scheduler_type="linear",
)  # fmt: skip
SIDES = (*LOSSES, "trl")
LENGTHS_TASK, LENGTHS = "bench/lengths_task.py", {"gsm8k": (120, 200), "tldr": (400, 60)}  # prompt and response, tokens
B, K, WARM = 7, 20, 3  # of --speed; updates that are not counted
TRL_STEPS = 7.5  # a second: in so many steps TRL's learning rate falls to 0
EVERY, SAMPLES, SUSTAINED = 0.5, 8, 5  # seconds between policies; samples of a problem; policies in a row
GOALS = 0.5, 0.65  # of pass@1
VENV = PROJECT / ".venv-trl"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy on its way."""

    seconds: float  # of training that it took
    step: int
    weights: dict[str, Tensor]


async def ours(seed: int, seconds: float, settings: Sequence[str]) -> list[Policy]:
    """Policies of a run with an objective of LOSSES, one every so many seconds."""
    policies: list[Policy] = []
    async with session("--seed", str(seed), "--max-seconds", str(seconds + 1), *OURS, *settings) as run:

        def policy() -> Policy:  # between two updates
            copies = {name: weight.detach().clone() for name, weight in run.trainer.policy.state_dict().items()}
            return Policy(time.perf_counter() - began, run.progress.step, copies)

        began = time.perf_counter()
        async with searching(run, warm=0), training(run):
            while time.perf_counter() - began < seconds:
                await asyncio.sleep(max(0.0, began + EVERY * (len(policies) + 1) - time.perf_counter()))
                policies.append(await run.in_trainer(policy))
    return policies


def trls(seed: int, seconds: float, settings: dict, model: str) -> list[Policy]:
    """The same of TRL."""
    grpo = ON_COUNTDOWN | {"seed": seed, "max_steps": round(TRL_STEPS * seconds)} | settings
    return run_trl("countdown", {"model": model}, EVERY, seconds, grpo)


def run_trl(task: str, settings: dict, every: float, seconds: float, grpo: dict) -> list[Policy]:
    """Policies of TRL on a task, one every so many seconds.

    Raises:
        RuntimeError: it failed; shows what it printed.
    """
    with tempfile.TemporaryDirectory() as out:
        wanted = {
            **{"task": task, "settings": settings, "model": settings["model"], "out": out},
            **{"every": every, "seconds": seconds, "grpo": grpo},
        }
        command = [str(VENV / "bin" / "python"), "-m", "bench.trl_grpo", json.dumps(wanted)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"TRL ended with {done.returncode}:\n{done.stderr}")
        clock = json.loads((Path(out) / "clock.json").read_text())
        return [
            Policy(passed, int(step), AutoModelForCausalLM.from_pretrained(f"{out}/step-{step}").state_dict())
            for step, passed in clock.items()
        ]


async def our_speed(model: str, prompt: int, response: int, seconds: float) -> float:
    """Responses that are searched and trained on in a second."""
    lengths = "--task", LENGTHS_TASK, "--model", model, "--prompt-tokens", str(prompt), "--max-tokens", str(response)
    async with session(*lengths) as run, searching(run):
        await train(run, WARM)
        async with training(run):
            before, began = replace(run.progress), time.perf_counter()
            while (passed := time.perf_counter() - began) < seconds or run.progress.step == before.step:
                await asyncio.sleep(0.01)
            trained_on = (run.progress.step - before.step) * B * K
            return min(run.progress.responses - before.responses, trained_on) / passed


def trl_speed(model: str, prompt: int, response: int, seconds: float) -> float:
    """The same of TRL: each step searches what it trains on."""
    gpu = dict(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.4, bf16=True)
    cpu = dict(use_cpu=True, bf16=False)
    grpo = TRL | dict(
        per_device_train_batch_size=K, gradient_accumulation_steps=B, num_generations=K, learning_rate=1e-6,
        max_completion_length=response, **(gpu if torch.cuda.is_available() else cpu),
    )  # fmt: skip
    settings = {"model": model, "prompt_tokens": prompt, "max_tokens": response}
    first, *_, last = run_trl(LENGTHS_TASK, settings, seconds / 4, seconds, grpo)
    return (last.step - first.step) * B * K / (last.seconds - first.seconds)


def make_venv() -> None:
    """TRL's own, where it is not there."""
    if (VENV / "made").is_file():
        return
    print(f"installing TRL into {VENV.name}: a minute, once", flush=True)
    pip = [str(VENV / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
    torch_here = f"torch=={torch.__version__}"
    for command in (
        [sys.executable, "-m", "venv", str(VENV)],
        [*pip, "--no-deps", torch_here],  # the same build as here
        [*pip, "-r", str(PROJECT / "bench" / "requirements-trl.txt")],
        *([[*pip, "trl[vllm]"]] if torch.cuda.is_available() else []),
    ):
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    (VENV / "made").touch()


class Exam:
    """Held-out problems, and how well policies do on them.

    Args:
        model: a Hugging Face folder, of the policies' architecture.
        problems: how many.
    """

    def __init__(self, model: str, problems: int):
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        settings = countdown.Task.Settings()
        self.task = countdown.Task(settings, self.tokenizer)
        unseen = settings.eval_prompts  # by the run's own evaluations
        self.problems = self.task.problems("test")[unseen : unseen + problems]
        self.asked = self.tokenizer(
            [p.prompt for p in self.problems], padding=True, padding_side="left", return_tensors="pt"
        )

    @torch.inference_mode()
    def __call__(self, policy: Policy) -> dict[str, float]:
        """`tasks.accuracy` of a policy."""
        self.model.load_state_dict(policy.weights)
        torch.manual_seed(0)
        tokens = self.model.generate(
            **self.asked,
            max_new_tokens=self.task.config.max_tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
        )[:, self.asked.input_ids.shape[1] :]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers = []
        for i, problem in enumerate(self.problems):
            samples = [
                Response(np.array([]), True, text=text, reward=countdown.reward(text, problem.answer))
                for text in texts[i * SAMPLES : (i + 1) * SAMPLES]
            ]
            answers.append(tasks.Answered(problem, np.array([]), samples[0], samples))
        return tasks.accuracy(answers)

    def milestones(self, policies: list[Policy]) -> dict[str, float]:
        """Seconds and distinct answers of the first policy from which on SUSTAINED in a row reach each goal, nan where
        none does; and `updates/s`."""
        figures = functools.cache(lambda i: self(policies[i]))
        found: dict[str, float] = {}
        for goal in GOALS:
            first, last = 0, SUSTAINED - 1  # of the policies in a row
            while last < len(policies):
                # From the last one backwards: the row begins anew behind one that falls short, so few are examined.
                short = next((i for i in range(last, first - 1, -1) if figures(i)["pass@1"] < goal), None)
                if short is None:
                    break
                first, last = short + 1, short + SUSTAINED
            reached = last < len(policies)
            found[f"s to {goal}"] = policies[first].seconds if reached else math.nan
            found[f"distinct at {goal}"] = figures(first)["distinct"] if reached else math.nan
        return found | {"updates/s": policies[-1].step / policies[-1].seconds}


def main(arguments: list[str] | None = None) -> None:
    """Train, examine, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    commands.add_argument("--only", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help="some sides")
    commands.add_argument("--seconds", type=float, default=30.0, help="of training")
    commands.add_argument("--problems", type=at_least(1), default=400)
    commands.add_argument("--trl", type=json.loads, default={}, help="settings of GRPOConfig, as JSON")
    commands.add_argument("--speed", action="store_true", help="measure responses a second instead")
    commands.add_argument("--size", default="1.1B", help="with --speed: of bench/lengths_task.py")
    wanted, settings = commands.parse_known_args(arguments)
    make_venv()
    if wanted.speed:
        table([speed(wanted.size, wanted.seconds) for _ in range(wanted.repeats)], wanted.json)
        return
    rows: list[dict] = []
    for seed in wanted.seeds:  # one side after the other, so that the machine's slower minutes meet all
        config: Any = parse(["--seed", str(seed)])
        model = countdown.Task.model(config)
        exam = Exam(model, wanted.problems)
        for side in wanted.only:
            if side == "trl":
                policies = trls(seed, wanted.seconds, wanted.trl, model)
            else:
                policies = asyncio.run(ours(seed, wanted.seconds, [*LOSSES[side], *settings]))
            rows.append({"side": side, "seed": seed} | exam.milestones(policies))
            print(rows[-1], flush=True)
    show_sides(rows, wanted)


def show_sides(rows: list[dict], wanted: argparse.Namespace) -> None:
    """Print a row for each side, and how many times as fast as TRL ours are, seed by seed."""
    _, _, *names = rows[0]
    of = {side: [row for row in rows if row["side"] == side] for side in wanted.only}
    print()
    cells = [[side, *(reached([row[name] for row in of[side]], 2) for name in names)] for side in of]
    show(("side", *names), cells, {}, as_json=False)
    if "trl" in of and len(of) > 1:
        print("\nTRL's seconds over ours\n")
        pairs = {side: list(zip(of[side], of["trl"], strict=True)) for side in LOSSES if side in of}
        marks = [f"s to {goal}" for goal in GOALS]
        cells = [[side, *(reached([b[mark] / a[mark] for a, b in pairs[side]], 2) for mark in marks)] for side in pairs]
        show(("side", *marks), cells, {}, as_json=False)
    if wanted.json:
        print(json.dumps({"rows": rows}))


def speed(size: str, seconds: float) -> dict[str, float]:
    """Responses a second of both, for each of the lengths."""
    model, figures = folder(size), dict[str, float]()
    for name, lengths in LENGTHS.items():
        here, there = asyncio.run(our_speed(model, *lengths, seconds)), trl_speed(model, *lengths, seconds)
        figures |= {f"ours_{name}": here, f"trl_{name}": there, f"speedup_{name}": here / there}
    return figures


if __name__ == "__main__":
    main()
