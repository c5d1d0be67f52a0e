"""The settings of a run and the command line."""

import argparse
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tasks
from buffer import EVICTION, REPLAY
from loss import OBJECTIVES


@dataclass(frozen=True)
class Config:
    """Post-train a language model by trajectory balance, searching and training at once.

    The defaults shown are those of the task: give --task with --help to see another's.
    """

    task: str = "countdown"
    """What to train on: countdown or gsm8k."""
    model: str = ""
    """The policy to start from: a Hugging Face folder or hub id."""
    data: str = ""
    """Where the task's problems are: a folder or a data set on the hub."""
    out: str = ""
    """Folder for what the run leaves; default runs/<task>-<time>."""
    seed: int = 0
    """Of the order of problems, the sampling, and the embedded model."""
    steps: int = 1000
    """Updates of the policy."""
    prompts_per_step: int = 8
    """B: distinct prompts in an update."""
    responses_per_prompt: int = 16
    """K: responses of each prompt in an update."""
    search_responses: int = 16
    """S: responses that a search generates for a prompt, at least K."""
    lr: float = 1e-5
    """Learning rate (AdamW)."""
    lr_warmup: int = 0
    """Updates in which the learning rate rises from 0."""
    lr_decay: int = 0
    """Updates at the end in which the learning rate falls to 0."""
    beta: float = 0.01
    """Weight of the KL to the model that the run starts from."""
    beta_final: float = 0.0
    """What beta is annealed to, in a straight line; 0: it stays."""
    beta_steps: int = 0
    """Updates until beta is beta_final."""
    temperature: float = 1.0
    """Of the sampling; the objective divides logits by it too."""
    max_tokens: int = 256
    """Longest response, in tokens."""
    sync_every: int = 2
    """k: updates between two syncs of the engines' weights."""
    on_policy_prob: float = 0.5
    """m: probability that a prompt of a batch is from the newest data, rather than any seen."""
    prime: int = 500
    """Responses searched before training starts."""
    capacity: int = 100
    """Responses that the buffer keeps of a prompt."""
    evict: str = "oldest"
    """Which response leaves a full buffer: oldest or lowest_reward."""
    replay: str = "uniform"
    """How responses of a prompt that is not new are chosen: uniform, or by softmax of the reward."""
    loss: str = "tb"
    """The objective, by its name in loss.py."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    micro_batch_tokens: int = 16384
    """Tokens in a forward pass: lower it when the trainer runs out of memory."""
    train_device: str = "auto"
    """Where the policy is trained: auto, cpu, cuda:0, ..."""
    search_devices: tuple[str, ...] = ("auto",)
    """Where engines run, one a device: auto, cpu, cuda:1, ..."""
    gpu_memory_utilization: float = 0.0
    """Share of a GPU's memory that an engine takes; 0: 0.9 of a GPU of its own, 0.4 of one shared with the trainer."""
    eval_every: int = 100
    """Updates between two evaluations; 0: only before and after."""
    eval_prompts: int = 400
    """Test problems in an evaluation; 0: no evaluation at all."""
    eval_samples: int = 8
    """Responses sampled for each of them: the k of pass@k."""
    save_every: int = 0
    """Updates between two checkpoints; 0: none, only the policy at the end."""
    resume: str = ""
    """Go on with the run in this folder, from its newest checkpoint."""

    def beta_at(self, step: int) -> float:
        """Beta of the update that follows `step` updates.

        >>> config = Config(beta=0.012, beta_final=0.004, beta_steps=4)
        >>> [config.beta_at(step) for step in (0, 2, 4, 9)]
        [0.012, 0.008, 0.004, 0.004]
        """
        done = min(1.0, step / self.beta_steps) if self.beta_steps else 0.0
        return self.beta + done * (self.beta_final - self.beta)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates: warm-up, stable, decay.

        >>> config = Config(lr=1.0, steps=10, lr_warmup=2, lr_decay=5)
        >>> [config.lr_at(step) for step in (0, 1, 2, 5, 6, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.8, 0.2]
        """
        up = (step + 1) / self.lr_warmup if self.lr_warmup else 1.0
        decay = min(self.lr_decay, self.steps)  # a run cut short decays all along
        down = (self.steps - step) / decay if decay else 1.0
        return self.lr * min(up, down, 1.0)


AT_LEAST = dict(
    seed=0, steps=1, prompts_per_step=1, responses_per_prompt=2, search_responses=2, lr_warmup=0, lr_decay=0,
    beta_final=0, beta_steps=0, max_tokens=1, sync_every=1, on_policy_prob=0, prime=0, capacity=1, micro_batch_tokens=1,
    gpu_memory_utilization=0, eval_every=0, eval_prompts=0, eval_samples=1, save_every=0,
)  # fmt: skip
AT_MOST = dict(on_policy_prob=1, gpu_memory_utilization=1, seed=2**31 - 1)
POSITIVE = ("lr", "beta", "temperature", "max_grad_norm")  # and finite
ONE_OF = dict(evict=EVICTION, replay=REPLAY, loss=OBJECTIVES)


def check(config: Config) -> None:
    """Refuse what cannot run.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    def refuse(name: str, allowed: str) -> None:
        raise ValueError(f"{name} is {getattr(config, name)!r}: it must be {allowed}")

    for name, low in AT_LEAST.items():
        if not low <= getattr(config, name) <= AT_MOST.get(name, sys.float_info.max):
            refuse(name, f"at least {low}" + (f" and at most {AT_MOST[name]}" if name in AT_MOST else " and finite"))
    for name in POSITIVE:
        if not 0 < getattr(config, name) < float("inf"):
            refuse(name, "a finite number above 0")
    for name, allowed in ONE_OF.items():
        if getattr(config, name) not in allowed:
            refuse(name, f"one of {', '.join(allowed)}")
    if config.search_responses < config.responses_per_prompt:
        refuse("search_responses", f"at least responses_per_prompt, {config.responses_per_prompt}")
    if (config.beta_final > 0) != (config.beta_steps > 0):
        refuse("beta_steps", "above 0 where beta_final is, and 0 where that is 0: they go together")
    for name in ("train_device", "search_devices"):
        for device in [config.train_device] if name == "train_device" else config.search_devices or [""]:
            kind, _, index = device.partition(":")
            if not (device in ("auto", "cpu") or (kind == "cuda" and index.isdecimal())):
                refuse(name, "auto, cpu, or cuda with a number, as in cuda:1")
    if len(set(config.search_devices)) < len(config.search_devices) and "cpu" not in config.search_devices:
        refuse("search_devices", "devices that differ")
    if not config.model:
        refuse("model", "a Hugging Face folder or hub id")
    if config.resume and config.out != config.resume:
        refuse("out", f"left out with --resume, which goes on in {config.resume}")
    if not config.resume and config.out and Path(config.out).exists():
        metrics = Path(config.out) / "metrics.jsonl"
        never_began = metrics.is_file() and not metrics.stat().st_size
        if not Path(config.out).is_dir() or (any(Path(config.out).iterdir()) and not never_began):
            refuse("out", "a new or empty folder (or go on with that run: --resume)")


def parse(arguments: list[str]) -> Config:
    """Settings from a command line: a flag beats the resumed run, which beats the task's defaults.

    Raises:
        ValueError: what is wrong with them, in one line.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--task", default=Config.task)
    first.add_argument("--resume", default="")
    try:
        known, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if known.resume:
        saved = Path(known.resume) / "config.json"
        if not saved.is_file():
            raise ValueError(f"resume is {known.resume!r}: it must be the folder of a run, and {saved} does not exist")
        try:
            settings = json.loads(saved.read_text()) | {"out": known.resume, "resume": known.resume}
            defaults = Config(**settings | {"search_devices": tuple(settings["search_devices"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"resume is {known.resume!r}: its config.json is not of this version ({error})") from None
    else:
        defaults = Config(**{"task": known.task} | tasks.load(known.task).defaults)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(Config, args=arguments, default=defaults, prog="tba.py")
    except SystemExit as stop:
        if stop.code:  # tyro draws a box around what is wrong: keep its first line
            lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
            raise ValueError(next(line for line in lines if line and line[0] not in "╭─╰")) from None
        raise
    check(config)
    return config
