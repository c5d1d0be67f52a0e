"""The settings of a run and the command line."""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from buffer import EVICTION, NEAR_DUPLICATE, REPLAY
from loss import IMPORTANCE_WEIGHTED, NEED_BETA, OBJECTIVES, TRAJECTORY_BALANCE
from optimizer import OPTIMIZERS


@dataclass(frozen=True)
class Config:
    """Post-train a language model, searching and training at once.

    The defaults shown are those of the task: give --task with --help to see another's.
    """

    task: str = "countdown"
    """What to train on: a task in tasks/ by its name, or the path of a Python file with one of your own."""
    model: str = ""
    """The policy to start from: a Hugging Face folder or hub id."""
    data: str = ""
    """Where the task's problems are: a folder or a data set on the hub."""
    seed_data: str = ""
    """JSONL file of demonstrations (prompt, response, optional reward) that are in the buffer before search starts."""
    out: str = ""
    """Folder for what the run leaves; default runs/<task>-<time>."""
    seed: int = 0
    """Of the order of problems, the sampling, and the embedded model."""
    steps: int = 1000
    """Updates of the policy."""
    max_seconds: float = 0.0
    """Seconds of training after which the run ends, its schedules run through, unless steps come first; 0: no limit."""
    prompts_per_step: int = 8
    """B: distinct prompts in an update."""
    responses_per_prompt: int = 16
    """K: responses of each prompt in an update."""
    search_responses: int = 16
    """S: responses that a search generates for a prompt, at least K."""
    loss: str = "tb"
    """The objective, by its name in loss.py: tb, tb_prime, rloo, grpo, dr_grpo, online_dpo or cispo."""
    importance_ratio: bool = True
    """Weigh tokens by pi/mu, in objectives that do; off: all count as on-policy, and search need not note mu."""
    lr: float = 1e-5
    """Learning rate."""
    optimizer: str = "adamw"
    """adamw: fp32 weights and moments; adamw_bf16 or adamw_8bit: bf16 weights, moments of 16 or 8 bits (torchao)."""
    lr_schedule: str = "constant"
    """constant, linear (to 0 on the last update), or wsd (warm-up, stable, decay to 0 on the last update)."""
    lr_warmup: int = 0
    """Updates in which the learning rate rises from 0, with every schedule."""
    lr_decay: int = 0
    """Updates at the end in which wsd decays."""
    beta: float = 0.01
    """Weight of the KL to the reference: the model that the run starts from, until --reference-reset. 0: there is none,
    which spares its time and memory, and no KL is told."""
    beta_schedule: str = "constant"
    """How beta goes to beta_final: constant (it stays), linear or cosine."""
    beta_final: float = 0.0
    """What beta is annealed to."""
    beta_steps: int = 0
    """Updates until beta is beta_final."""
    gamma: float = 1.0
    """With loss tb or tb_prime the optimum is pi_ref^(1/gamma) exp(r/beta): above 1 the reference weighs less."""
    gamma_final: float = 1.0
    """What gamma is annealed to, linearly."""
    gamma_steps: int = 0
    """Updates until gamma is gamma_final; 0: it stays."""
    reference_reset: int = 0
    """rho: updates between two resets of the reference to the policy; 0: it stays."""
    temperature: float = 1.0
    """Of the sampling; the objective divides logits by it too."""
    search_temperatures: tuple[float, ...] = ()
    """Lowest and highest: each search draws its own temperature between them, whatever the objective's is."""
    max_tokens: int = 256
    """Longest response, in tokens."""
    min_tokens: int = 0
    """Tokens of a response before which it cannot end."""
    reward_timeout: float = 60.0
    """Seconds that the reward of a prompt's responses may take; after that they are dropped, and counted."""
    reward_concurrency: int = 64
    """Prompts whose responses are scored at a time."""
    sync_every: int = 2
    """k: updates between two syncs of the engines' weights."""
    check_sync: bool = False
    """Stop where engines and trainer differ after a sync, by above 0.001 nats a token (bf16: 0.1) on average."""
    strict: bool = False
    """Search and training take turns. k and m are 1 unless given: each update has responses of the very policy."""
    on_policy_prob: float = 0.5
    """m: probability that a prompt of a batch is from the newest data, rather than any seen."""
    prime: int = 500
    """Responses searched before training starts."""
    search_ahead: float = 8.0
    """Search waits where it has found more than so many times B x K responses for each update made."""
    capacity: int = 100
    """Responses that the buffer keeps of a prompt."""
    buffer_responses: int = 1_000_000
    """Responses that the buffer keeps in all: then the oldest leaves."""
    buffer_gib: float = 8.0
    """Memory that they may take, in GiB."""
    evict: str = "oldest"
    """Which response leaves a full buffer: oldest or lowest_reward."""
    near_duplicates: str = "exact"
    """What counts as a duplicate: exact, or what is near by edit distance (edit) or by its embedding (cosine)."""
    near_duplicate_distance: float = 0.25
    """How near: edits over the tokens of both, or cosine distance. Only a better response replaces a near duplicate."""
    replay: str = "uniform"
    """How responses of a prompt that is not new are chosen: uniform, or reward (by its softmax)."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    micro_batch_tokens: int = 16384
    """Tokens in a forward pass: lower it when the trainer runs out of memory."""
    activation_memory_budget: float = 1.0
    """Of what a layer would keep for its backward pass, the share that is kept; the rest is computed anew (CUDA)."""
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
    save_every: int = 100
    """Updates between two checkpoints, which each evaluation has too; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that stay, beside the one with the best evaluation; 0: all stay."""
    resume: str = ""
    """Go on with the run in this folder from its newest checkpoint; auto: in --out (or the task's newest), if any."""
    stall_seconds: float = 120.0
    """Say what is awaited where no response came, or no update ended, for so long."""
    tensorboard: bool = False
    """Metrics for TensorBoard too, in OUT/tensorboard/ (pip install tensorboard)."""
    wandb: bool = False
    """Metrics for Weights & Biases too (pip install wandb)."""
    dry_run: bool = False
    """Show the resolved settings and the first prompt as the model sees it, and end."""
    plan: bool = False
    """Show what memory the run needs on each device, from the model's config alone, whether it fits, and end."""

    at_least: ClassVar[dict[str, float]] = {}  # limits of a task's own settings, as AT_LEAST below
    at_most: ClassVar[dict[str, float]] = {}
    positive: ClassVar[tuple[str, ...]] = ()

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference: not where it would never count."""
        return self.beta > 0 or self.beta_final > 0

    def beta_at(self, step: int) -> float:
        """Beta of the update that follows `step` updates.

        >>> config = Config(beta=0.012, beta_schedule="linear", beta_final=0.004, beta_steps=4)
        >>> [config.beta_at(step) for step in (0, 2, 4, 9)]
        [0.012, 0.008, 0.004, 0.004]
        >>> config = Config(beta=1.0, beta_schedule="cosine", beta_final=0.0, beta_steps=3)
        >>> [round(config.beta_at(step), 6) for step in (0, 1, 2, 3, 4)]
        [1.0, 0.75, 0.25, 0.0, 0.0]
        """
        if self.beta_schedule == "constant":
            return self.beta
        done = min(1.0, step / self.beta_steps)
        if self.beta_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.beta + done * (self.beta_final - self.beta)

    def gamma_at(self, step: int) -> float:
        """Gamma of the update that follows `step` updates.

        >>> [Config(gamma=2.0, gamma_steps=4).gamma_at(step) for step in (0, 2, 4, 9)]
        [2.0, 1.5, 1.0, 1.0]
        """
        done = min(1.0, step / self.gamma_steps) if self.gamma_steps else 0.0
        return self.gamma + done * (self.gamma_final - self.gamma)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates.

        >>> config = Config(lr=1.0, steps=11, lr_schedule="wsd", lr_warmup=2, lr_decay=5)
        >>> [config.lr_at(step) for step in (0, 1, 2, 5, 6, 9, 10)]
        [0.5, 1.0, 1.0, 1.0, 0.8, 0.2, 0.0]
        >>> config = Config(lr=1.0, steps=5, lr_schedule="linear")
        >>> [config.lr_at(step) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        """
        up = (step + 1) / self.lr_warmup if self.lr_warmup else 1.0
        last = self.steps - 1
        decay = {"linear": last - self.lr_warmup, "wsd": min(self.lr_decay, last)}.get(self.lr_schedule)
        down = 1.0 if decay is None else (last - step) / max(1, decay)
        return self.lr * min(up, down, 1.0)

    def step_at(self, step: int, seconds: float) -> int:
        """Where the schedules are after so many updates and seconds: at the step, or further where time runs out first.

        >>> [Config(steps=100, max_seconds=20.0).step_at(30, seconds) for seconds in (1, 10, 25)]
        [30, 50, 99]
        """
        share = seconds / self.max_seconds if self.max_seconds else 0.0
        return min(max(step, int(share * self.steps)), self.steps - 1)

    def ended(self, step: int, seconds: float) -> bool:
        """Whether training ends after so many updates and seconds.

        >>> [Config(steps=100, max_seconds=20.0).ended(*at) for at in ((99, 19.9), (100, 5.0), (9, 20.0))]
        [False, True, True]
        >>> Config(steps=100).ended(99, 1e9)
        False
        """
        return step >= self.steps or 0 < self.max_seconds <= seconds

    @property
    def on_policy(self) -> bool:
        """Whether the objective takes every response as the policy's own, and asks for no log-probabilities of it."""
        return self.loss not in IMPORTANCE_WEIGHTED or not self.importance_ratio


AT_LEAST = dict(
    activation_memory_budget=0, seed=0, steps=1, max_seconds=0, prompts_per_step=1, responses_per_prompt=2,
    search_responses=2, lr_warmup=0, lr_decay=0, beta=0, beta_final=0, beta_steps=0, gamma_steps=0, reference_reset=0,
    max_tokens=1, min_tokens=0,
    sync_every=1, on_policy_prob=0, prime=0, capacity=1, near_duplicate_distance=0, micro_batch_tokens=1,
    gpu_memory_utilization=0, eval_every=0, eval_prompts=0, eval_samples=1, save_every=0, keep=0, search_ahead=1,
    reward_concurrency=1,
)  # fmt: skip
AT_MOST = dict(
    activation_memory_budget=1, on_policy_prob=1, gpu_memory_utilization=1, near_duplicate_distance=2, seed=2**31 - 1
)
# And finite.
POSITIVE = (
    "lr",
    "temperature",
    "max_grad_norm",
    "gamma",
    "gamma_final",
    "reward_timeout",
    "buffer_gib",
    "stall_seconds",
)
ONE_OF: dict[str, Collection[str]] = dict(
    evict=EVICTION, replay=REPLAY, near_duplicates=NEAR_DUPLICATE, loss=OBJECTIVES, optimizer=OPTIMIZERS,
    lr_schedule=("constant", "linear", "wsd"), beta_schedule=("constant", "linear", "cosine"),
)  # fmt: skip
STRICT: dict[str, Any] = dict(strict=True, sync_every=1, on_policy_prob=1.0, prime=0)  # defaults with --strict
MAY_CHANGE = {  # in a run that is resumed: how long it lasts, what is looked at and kept, and on which devices
    "steps", "max_seconds", "eval_every", "eval_prompts", "eval_samples", "save_every", "keep", "stall_seconds",
    "check_sync", "out", "resume", "dry_run", "plan", "reward_timeout", "reward_concurrency",
    "search_ahead", "tensorboard", "wandb", "buffer_responses", "buffer_gib", "micro_batch_tokens",
    "activation_memory_budget", "train_device", "search_devices", "gpu_memory_utilization",
}  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    def refuse(name: str, allowed: str) -> None:
        raise ValueError(f"{name} is {getattr(config, name)!r}: it must be {allowed}")

    at_least, at_most = AT_LEAST | config.at_least, AT_MOST | config.at_most
    for name, low in at_least.items():
        if not low <= getattr(config, name) <= at_most.get(name, sys.float_info.max):
            refuse(name, f"at least {low}" + (f" and at most {at_most[name]}" if name in at_most else " and finite"))
    for name in (*POSITIVE, *config.positive):
        if not 0 < getattr(config, name) < float("inf"):
            refuse(name, "a finite number above 0")
    for name, allowed in ONE_OF.items():
        if getattr(config, name) not in allowed:
            refuse(name, f"one of {', '.join(allowed)}")
    if config.search_responses < config.responses_per_prompt:
        refuse("search_responses", f"at least responses_per_prompt, {config.responses_per_prompt}")
    if config.buffer_responses < (batch := config.prompts_per_step * config.responses_per_prompt):
        refuse("buffer_responses", f"at least prompts_per_step x responses_per_prompt, {batch}")
    annealed = config.beta_schedule != "constant"
    if annealed != (config.beta_steps > 0):
        refuse("beta_steps", "above 0 with beta_schedule linear or cosine, and 0 with constant")
    if not annealed and config.beta_final:
        refuse("beta_final", "0 with beta_schedule constant")
    if (config.lr_schedule == "wsd") != (config.lr_decay > 0):
        refuse("lr_decay", "above 0 with lr_schedule wsd, and 0 with others")
    if config.loss not in TRAJECTORY_BALANCE and (config.gamma != 1 or config.gamma_steps):
        refuse("gamma", f"1, and gamma_steps 0, with loss {config.loss}")
    if not config.has_reference:
        for name, unset in (("reference_reset", 0), ("gamma", 1), ("gamma_steps", 0)):
            if getattr(config, name) != unset:
                refuse(name, f"{unset} with beta 0, where there is no reference")
    if config.gamma_final != 1 and not config.gamma_steps:
        refuse("gamma_final", "1 with gamma_steps 0")
    low_high = config.search_temperatures
    if low_high and not (len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < float("inf")):
        refuse("search_temperatures", "two numbers above 0, the lower first")
    if config.min_tokens > config.max_tokens:
        refuse("min_tokens", f"at most max_tokens, {config.max_tokens}")
    if config.seed_data:
        if not config.on_policy:
            ratio = " (or give --no-importance-ratio)"
            refuse(
                "seed_data", f"left out with loss {config.loss}, which reads the policy that wrote a response{ratio}"
            )
        if config.strict:
            refuse("seed_data", "left out with strict, where each update has responses of the very policy")
    if config.strict and config.prime:
        refuse("prime", "0 with strict, which searches before each update")
    if config.loss in NEED_BETA:
        for name in ("beta", "beta_final") if annealed else ("beta",):
            if not getattr(config, name):
                refuse(name, f"above 0 with loss {config.loss}")
    for name in ("train_device", "search_devices"):
        for device in [config.train_device] if name == "train_device" else config.search_devices or [""]:
            kind, _, index = device.partition(":")
            if not (device in ("auto", "cpu") or (kind == "cuda" and index.isdecimal())):
                refuse(name, "auto, cpu, or cuda with a number, as in cuda:1")
    if len(set(config.search_devices)) < len(config.search_devices) and "cpu" not in config.search_devices:
        refuse("search_devices", "devices that differ")
    if not config.model:
        refuse("model", "a Hugging Face folder or hub id")
    if config.optimizer != "adamw" and not importlib.util.find_spec("torchao"):
        refuse("optimizer", "adamw, or torchao must be installed: pip install torchao")
    for package in ("tensorboard", "wandb"):
        if getattr(config, package) and not importlib.util.find_spec(package):
            raise ValueError(f"{package} is not installed: pip install {package}, or leave --{package} out")
    if config.resume not in ("", "auto", config.out):
        refuse("out", f"left out with --resume, which goes on in {config.resume}")
    if not begun(config.resume, config.out) and config.out and Path(config.out).exists():
        metrics = Path(config.out) / "metrics.jsonl"
        never_began = metrics.is_file() and not metrics.stat().st_size
        if not Path(config.out).is_dir() or (
            set(path.name for path in Path(config.out).iterdir()) - {"lock"} and not never_began
        ):
            refuse("out", "a new or empty folder (or go on with that run: --resume)")


def begun(resume: str, out: str) -> bool:
    """Whether --resume goes on with what is in that folder; auto does not where nothing is."""
    return bool(resume and out) and (Path(out) / "config.json").is_file()


def parse(arguments: list[str]) -> Config:
    """Settings from a command line: a flag beats the resumed run, which beats the task's defaults.

    Raises:
        ValueError: what is wrong with them, in one line.
    """
    import tasks

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--task", "--resume", "--out"):
        first.add_argument(name, default="")
    first.add_argument("--strict", action=argparse.BooleanOptionalAction, default=False)
    try:
        known, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    name = known.task or Config.task
    out = known.out if known.resume == "auto" else known.resume
    if known.resume == "auto" and not out:  # names end with the time
        runs = sorted(path.parent for path in Path("runs").glob(f"{Path(name).stem}-*-*/config.json"))
        out = str(runs[-1]) if runs else ""
    if begun(known.resume, out):
        saved = settings_of(out, known)
        config = command_line(saved, arguments)
        for field in dataclasses.fields(config):
            was, now = getattr(saved, field.name), getattr(config, field.name)
            if was != now and field.name not in MAY_CHANGE:
                raise ValueError(
                    f"{field.name} was {was!r} in {out}, and is {now!r} now: it cannot change when a run is resumed "
                    f"(a new run can start from what that one learned: --model {out}/model)"
                )
    elif known.resume not in ("", "auto"):
        raise ValueError(f"resume is {out!r}: it must be the folder of a run, and {out}/config.json does not exist")
    else:
        config = command_line(tasks.load(name).Settings(task=name, **STRICT if known.strict else {}), arguments)
    check(config)
    return config


def settings_of(out: str, known: argparse.Namespace) -> Config:
    """The settings of a run that is to go on.

    Raises:
        ValueError: they are not there, or are another version's.
    """
    import tasks

    try:
        settings = json.loads((Path(out) / "config.json").read_text()) | {"out": out, "resume": known.resume}
        if known.task and known.task != settings["task"]:
            raise ValueError(f"task was {settings['task']!r}, and is {known.task!r} now")
        settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        return tasks.load(settings["task"]).Settings(**settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"resume is {known.resume!r}: {out}/config.json does not fit ({error})") from None


def command_line(defaults: Config, arguments: list[str]) -> Config:
    """Settings as the command line has them.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(defaults), args=arguments, default=defaults, prog="tba.py")
    except SystemExit as stop:
        if stop.code:  # tyro draws a box around what is wrong: keep its first line
            lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
            wrong = next(line for line in lines if line and line[0] not in "╭─╰")
            raise ValueError(f"{wrong} (--help lists what there is)" if "nrecognized" in wrong else wrong) from None
        raise
