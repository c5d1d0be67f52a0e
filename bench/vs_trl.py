"""Which trains sooner to the same accuracy, this or TRL's GRPOTrainer? Countdown, from the same warmed-up models.

    python -m bench.vs_trl                      seeds 0 to 2: about 10 minutes on 2 cores
    python -m bench.vs_trl --lr 1e-4 --beta 0.1 other settings of tba.py for our side
    python -m bench.vs_trl --trl '{"learning_rate": 4e-4}'    and of GRPOConfig for TRL's
    python -m bench.vs_trl --json               prints, last, all figures as one JSON object

Both use both cores as they see fit, and both get a clock of training: from when searching begins, without loading,
compiling and evaluating. Every second the policy is set aside; afterwards each is asked for 8 responses to each of 800
held-out problems that neither has seen. `seconds` is the clock of the first policy with a pass@1 of 0.50 whose two
successors have it too; `distinct` is how many different right answers it gives a problem. TRL (in .venv-trl, which is
made at first) has the settings that were best for it on 2 cores: see bench/README.md.
"""

import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks
from bench.runs import PROJECT, at_least, median_and_range, parser, show
from bench.session import searching, session, train
from config import parse
from searcher import Response
from tasks import countdown

OURS = "--lr", "2e-4", "--lr-schedule", "constant", "--beta", "0.03"
TRL = dict(
    per_device_train_batch_size=256, num_generations=16, max_completion_length=13, temperature=1.0, loss_type="dr_grpo",
    scale_rewards="none", beta=0.0, learning_rate=2e-4, lr_scheduler_type="constant", weight_decay=0.0, use_cpu=True,
    bf16=False, gradient_checkpointing=False,
)  # fmt: skip
EVERY, SAMPLES, SUSTAINED, GOAL = 1.0, 8, 3, 0.5  # seconds between policies; samples of a problem; evaluations
VENV = PROJECT / ".venv-trl"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy on its way."""

    seconds: float  # of training that it took
    step: int
    weights: dict[str, Tensor]


async def ours(seed: int, seconds: float, settings: list[str]) -> list[Policy]:
    """Policies of a run."""
    policies: list[Policy] = []
    async with session("--seed", str(seed), *OURS, *settings) as run:
        began = time.perf_counter()
        async with searching(run, warm=0):
            clock = time.perf_counter() - began  # in which the first responses were searched
            while clock < seconds:
                clock += await train(run, 5)
                if clock >= EVERY * (len(policies) + 1):
                    weights = {
                        name: weight.detach().clone() for name, weight in run.trainer.policy.state_dict().items()
                    }
                    policies.append(Policy(clock, run.step, weights))
    return policies


def trls(seed: int, seconds: float, settings: dict, model: str) -> list[Policy]:
    """The same of TRL.

    Raises:
        RuntimeError: it failed; shows what it printed.
    """
    with tempfile.TemporaryDirectory() as out:
        wanted = {
            **{"task": "countdown", "settings": {"model": model}, "model": model, "out": out},
            **{"every": EVERY, "seconds": seconds, "grpo": TRL | {"seed": seed} | settings},
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
                Response(np.array([]), True, None, text, countdown.reward(text, problem.answer))
                for text in texts[i * SAMPLES : (i + 1) * SAMPLES]
            ]
            answers.append(tasks.Answered(problem, np.array([]), samples[0], samples))
        return tasks.accuracy(answers)

    def first_good(self, policies: list[Policy]) -> dict[str, float]:
        """Clock, step and figures of the first policy that has the accuracy, and whose successors have it too."""
        found: list[tuple[Policy, dict[str, float]]] = []
        for policy in policies:
            figures = self(policy)
            found = [*found, (policy, figures)] if figures["pass@1"] >= GOAL else []
            if len(found) == SUSTAINED:
                break
        if len(found) < SUSTAINED:
            return {"seconds": math.nan, "step": math.nan, "distinct": math.nan, "steps_per_s": rate(policies)}
        policy, figures = found[0]
        return {
            **{"seconds": policy.seconds, "step": policy.step, "distinct": figures["distinct"]},
            **{"steps_per_s": rate(policies)},
        }


def rate(policies: list[Policy]) -> float:
    """Updates a second."""
    return policies[-1].step / policies[-1].seconds


def rows(found: list[dict]) -> Iterator[tuple[str, ...]]:
    """Of the table: a seed each, and the medians."""
    for seed, each in enumerate(found):
        yield str(seed), *(f"{each[name]:.2f}" for name in COLUMNS)
    yield "all", *(median_and_range([each[name] for each in found], 2) for name in COLUMNS)


SIDES = "ours", "trl"
COLUMNS = ("speedup", *(f"{side}_{name}" for name in ("seconds", "distinct", "step", "steps_per_s") for side in SIDES))


def main(arguments: list[str] | None = None) -> None:
    """Train, examine, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--seeds", type=at_least(1), default=3)
    commands.add_argument("--seconds", type=float, default=60.0, help="of training, at most")
    commands.add_argument("--problems", type=at_least(1), default=800)
    commands.add_argument("--trl", type=json.loads, default={}, help="settings of GRPOConfig, as JSON")
    wanted, settings = commands.parse_known_args(arguments)
    make_venv()
    found = []
    for seed in range(wanted.seeds):  # both one after the other, so that the machine's slower minutes meet both
        config: Any = parse(["--seed", str(seed), *settings])
        model = countdown.Task.model(config)
        exam = Exam(model, wanted.problems)
        here = exam.first_good(asyncio.run(ours(seed, wanted.seconds, settings)))
        there = exam.first_good(trls(seed, wanted.seconds, wanted.trl, model))
        figures = {
            f"{side}_{name}": value
            for side, each in zip(SIDES, (here, there), strict=True)
            for name, value in each.items()
        }
        found.append(figures | {"speedup": there["seconds"] / here["seconds"]})
        print(f"seed {seed}: {found[-1]}", flush=True)
    medians = {name: float(torch.tensor([each[name] for each in found]).median()) for name in COLUMNS}
    show(("seed", *COLUMNS), rows(found), medians | {"seeds": found}, wanted.json)


if __name__ == "__main__":
    main()
