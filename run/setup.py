"""From settings to a checked setup: everything that can be wrong is found here, before a model is loaded."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

import tasks
from buffer import EVICTION, NEAR_DUPLICATES, REPLAY, Buffer, Response
from config import Config
from run import checkpoint
from run.check import is_run_folder
from run.checkpoint import Checkpoints
from run.console import printable, timed
from run.devices import all_gpus, cores, devices, on_cluster, start_fork_server
from run.metrics import Metrics
from run.policy import load_tokenizer
from run.prompts import Prompt, PromptSampler, demonstrations, tokenize
from run.snapshot import read_buffer
from search.engine import MAX_NUM_SEQS, EngineSettings

PROBE_TOKENS = 64  # on which engines and trainer are compared after each sync

log = logging.getLogger("tba")


class FinishedRun(Exception):
    """The run that was to be resumed has ended; says so."""


@dataclass
class Outcome:
    """What there is to say of a run when it has ended."""

    first: int = 0  # updates before it began
    step: int = 0  # updates in all
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: str = ""  # why the last checkpoint could not be written


@dataclass
class Setup:
    """A run whose settings, model folder and data are checked. `open` makes its folder and files."""

    config: Config
    out: Path
    task: tasks.Task
    tokenizer: Any
    prompts: list[Prompt]
    test_prompts: list[Prompt]
    demonstrations: dict[int, list[Response]]  # by prompt id
    probe: np.ndarray  # tokens, on which engines and trainer are compared
    model: str  # a Hugging Face folder or hub id
    train_devices: list[str]
    search_devices: list[str]
    train_cores: frozenset[int]
    search_cores: frozenset[int]
    engines: list[EngineSettings]  # of this machine
    remote: dict[str, tuple[EngineSettings, int, int]]  # of a cluster: how many of each there must be and may be
    cluster: Counter[str]  # what Ray says that it has
    buffer: Buffer
    sampler: PromptSampler
    lock: IO | None = None
    resume: Path | None = None  # the checkpoint to go on from
    state: dict = field(default_factory=dict)  # its state.json
    outcome: Outcome = field(default_factory=Outcome)
    plan: Any = None  # where it chose the devices
    metrics: Metrics = None  # from `open` on
    checkpoints: Checkpoints = None

    @property
    def loop_cores(self) -> frozenset[int]:
        """CPU cores of the event loop: those of the trainer where engines need theirs."""
        return self.train_cores if "cpu" in self.search_devices else frozenset(os.sched_getaffinity(0))

    @property
    def sampling(self) -> dict[str, Any]:
        """How engines sample responses."""
        return {name: getattr(self.config, name) for name in ("temperature", "max_tokens", "min_tokens")}

    @property
    def local_devices(self) -> list[str]:
        """Devices of this machine that search, or the one that trains where none does."""
        return [device for device in self.search_devices if not on_cluster(device)] or self.train_devices[:1]

    @property
    def judge_devices(self) -> list[str]:
        """Devices of the models that score, which take them in turn."""
        return list(self.config.judge_devices) or self.local_devices[-1:]

    def show(self) -> None:
        """Print the settings and the first prompt."""
        print(json.dumps(dataclasses.asdict(self.config), indent=2))
        print(f"\ntraining on {', '.join(self.train_devices)}, searching on {', '.join(self.search_devices)}")
        print(f"{len(self.prompts)} training problems, {len(self.test_prompts)} test problems in an evaluation")
        first = self.prompts[0]
        text = self.tokenizer.decode(first.tokens, clean_up_tokenization_spaces=False)
        print(f"the first prompt as the model sees it, {len(first.tokens)} tokens:\n\n{printable(text)}")

    def open(self) -> None:
        """Make the run's folder, and open its files.

        Raises:
            ValueError: they cannot be written, or a tracker refuses.
        """
        step, out = self.state.get("step", 0), self.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or checkpoint.lock(out)
            checkpoint.clean_up(out, step)
            self.metrics = Metrics(out, self.config, self.tokenizer, step, self.state.get("time", 0.0))
            checkpoint.write_text(out / "config.json", json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"out is {str(out)!r}: it must be a folder that can be written ({error})") from None
        self.checkpoints = Checkpoints(out, self.config.keep)
        for at, figures in self.metrics.evaluations.items():
            self.checkpoints.scores[at] = figures.get(self.task.best, float("nan"))
        self.outcome = Outcome(step, step, self.metrics.evaluations)


def prepare(config: Config) -> Setup:
    """The setup of a run.

    Raises:
        ValueError: the model or the data is not there or not as it must be; says what and where.
        FinishedRun: --resume auto finds a run that has ended.
    """
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    shown_only, cluster = config.dry_run or config.plan, Counter[str]()
    with contextlib.nullcontext() if shown_only else timed("importing PyTorch and transformers"):
        train_devices, search_devices = devices(config.train_devices, config.search_devices, config.judge_devices)
        if any(map(on_cluster, [*search_devices, *config.judge_devices])):
            from search.cluster import connect

            cluster = connect()
        if not shown_only:
            start_fork_server(preload="cpu" in search_devices)
        from transformers.utils.logging import disable_progress_bar

        from train import trainer  # noqa: F401

    disable_progress_bar()
    if "cpu" in train_devices and config.activation_memory_budget != 1:
        budget = config.activation_memory_budget
        raise ValueError(f"activation_memory_budget is {budget}: it must be 1 on the CPU, where nothing is compiled")
    out = Path(config.out or f"runs/{Path(config.task).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    Task = tasks.load(config.task)
    model = Task.model(config)
    tokenizer, longest = load_tokenizer(model, weights=not config.plan)
    task = Task(config, tokenizer)
    if config.near_duplicates == "cosine" and Task.embed is tasks.Task.embed:
        raise ValueError(f"near_duplicates is 'cosine': task {config.task} has no embeddings to compare by")
    prompts = tokenize(task.problems("train"), tokenizer, longest - config.max_tokens)
    if len(prompts) < config.prompts_per_step:
        raise ValueError(f"prompts_per_step is {config.prompts_per_step}: there are {len(prompts)} problems")
    test = task.problems("test")[: config.eval_prompts] if config.eval_prompts else []
    test_prompts = tokenize(test, tokenizer, longest - config.max_tokens) if test else []
    shown = {}
    if config.seed_data:
        shown = demonstrations(config.seed_data, prompts, tokenizer, config.min_tokens, config.max_tokens)
    longest_prompt = max((prompt.tokens for prompt in prompts + test_prompts), key=len)
    max_model_len = len(longest_prompt) + config.max_tokens
    train_cores, search_cores = cores()
    setup = Setup(
        config, out, task, tokenizer, prompts, test_prompts, shown,
        probe=np.resize(longest_prompt, min(PROBE_TOKENS, max_model_len - 1)),  # repeated where it is shorter
        model=model,
        train_devices=train_devices,
        search_devices=search_devices,
        train_cores=train_cores,
        search_cores=search_cores,
        engines=[],
        remote={},
        cluster=cluster,
        buffer=Buffer(
            config.capacity, EVICTION[config.evict], REPLAY[config.replay], config.seed,
            NEAR_DUPLICATES[config.near_duplicates], config.near_duplicate_distance, config.buffer_gib * 2**30,
            config.prompts_per_step,
        ),
        sampler=PromptSampler(len(prompts), config.seed),
    )  # fmt: skip
    if config.resume and is_run_folder(config.out):
        setup.lock = checkpoint.lock(out)
        load_checkpoint(setup)
    gpus = [gpu for gpu in all_gpus() if gpu not in config.search_devices]
    if config.train_devices == ("auto",) and len(gpus) > 1:
        from tools.plan import Plan

        try:
            setup.plan = Plan(setup)
            setup.plan.choose_devices(gpus)
        except ValueError as error:  # what the trainer may do all the same
            log.info(f"{train_devices[0]} trains alone: {error} (--train-devices names others)")
        train_devices, search_devices = setup.train_devices, setup.search_devices
    places = [(device, on_cluster(device)) for device in search_devices]
    here = sum(remote is None for _, remote in places)
    count = here + sum(remote[1] for _, remote in places if remote)
    for i, (device, remote) in enumerate(places):
        kind = remote[0] if remote else device
        share = config.gpu_memory_utilization or (0.4 if device in train_devices else 0.9)
        engine = EngineSettings(
            kind,
            model,
            max_model_len,
            config.seed + setup.state.get("step", 0) + i,
            out / "engine.log",
            sequences_per_engine(config, count, MAX_NUM_SEQS[kind.split(":")[0]]),
            share,
            frozenset() if remote else search_cores,
            1 if remote else max(1, len(search_cores) // here),
        )
        if remote:
            setup.remote[device] = engine, *remote[1:]
        else:
            setup.engines.append(engine)
    return setup


def sequences_per_engine(config: Config, engines: int, largest: int) -> int:
    """Sequences in flight in each of so many engines: --max-num-seqs, or about two updates' worth in all of them.

    >>> config = Config(prompts_per_step=8, responses_per_prompt=16, search_responses=16)
    >>> sequences_per_engine(config, 1, 512), sequences_per_engine(config, 3, 512), sequences_per_engine(config, 1, 64)
    (256, 86, 64)
    """
    batch = config.prompts_per_step * config.responses_per_prompt
    wanted = math.ceil(min(2, config.search_ahead) * batch / engines)
    return config.max_num_seqs or min(largest, max(config.search_responses, wanted))


def load_checkpoint(setup: Setup) -> None:
    """Load the newest checkpoint of the run that is resumed, except for what the trainer loads from it.

    Raises:
        ValueError: there is none, or it does not fit.
        FinishedRun: the run has ended, and is resumed by --resume auto.
    """
    config, out = setup.config, setup.out
    newest = checkpoint.newest(out)
    if not newest:
        if config.resume == "auto":
            return
        raise ValueError(f"resume is {config.resume!r}: it has no checkpoint that is whole (--resume auto begins anew)")
    folder, state = newest
    step = state["step"]
    if config.resume == "auto" and config.done(step, state["time"]):
        raise FinishedRun(f"{out} is done: it has made {step} updates in {state['time']:.0f} s")
    if step >= config.steps:
        raise ValueError(f"steps is {config.steps}: it must be above {step}, the newest checkpoint's")
    try:
        setup.sampler.load_state_dict(state["order"])
        setup.buffer.load_state_dict(read_buffer(folder))
    except Exception as error:
        raise ValueError(f"{folder} cannot be read ({error}): move it away to go on from the one before") from error
    tokens = {i: entry.tokens for i, entry in setup.buffer.prompts.items()}
    for i in {*tokens, *setup.sampler.remaining}:
        if i >= len(setup.prompts) or not np.array_equal(
            tokens.get(i, setup.prompts[i].tokens), setup.prompts[i].tokens
        ):
            raise ValueError(f"data is {config.data!r}: its problems are not those that {folder} was made with")
    setup.resume, setup.state = folder, state
