"""TRL's GRPOTrainer on a task of this project: what bench.vs_trl runs in TRL's own .venv.

    .venv-trl/bin/python -m bench.trl_grpo '{"task": "countdown", "model": DIR, "out": DIR, "seconds": 60, ...}'

Leaves the policy as OUT/step-N every so many seconds of training, and OUT/clock.json: how many seconds of training each
took, without the time that saving took.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import tasks


class Snapshots(TrainerCallback):
    """Saves the policy now and then, and ends the training.

    Args:
        out: a folder.
        every: seconds of training between two.
        seconds: of training in all.
    """

    def __init__(self, out: Path, every: float, seconds: float):
        self.out, self.every, self.seconds = out, every, seconds
        self.clock: dict[int, float] = {}  # seconds by step
        self.off = 0.0  # that saving took

    def on_train_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, _, state, control, model=None, **__):
        now = time.perf_counter()
        passed = now - self.began - self.off
        if passed >= self.every * (len(self.clock) + 1):
            self.clock[state.global_step] = passed
            model.save_pretrained(self.out / f"step-{state.global_step}")
            self.off += time.perf_counter() - now
        control.should_training_stop = passed >= self.seconds


def main() -> None:
    """Train."""
    wanted = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"])
    kind = tasks.load(wanted["task"])
    task: Any = kind(kind.Settings(**wanted["settings"]), tokenizer)
    problems = task.problems("train")

    def reward(completions, problem, **_) -> list[float]:
        rewards: list[float] = []
        for text, i in zip(completions, problem, strict=True):
            response: Any = SimpleNamespace(text=text)
            rewards += task.reward(problems[i], [response])
        return rewards

    out = Path(wanted["out"])
    snapshots = Snapshots(out, wanted["every"], wanted["seconds"])
    GRPOTrainer(
        model=wanted["model"],
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(out), report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
            num_train_epochs=1000, **wanted["grpo"],
        ),
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "problem": i} for i, p in enumerate(problems)]),
        processing_class=tokenizer,
        callbacks=[snapshots],
    ).train()  # fmt: skip
    (out / "clock.json").write_text(json.dumps(snapshots.clock))


if __name__ == "__main__":
    main()
