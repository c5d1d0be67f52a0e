"""A run: search and training side by side, in one process.

    tasks/ --prompts--> searcher.py --responses--> scoring.py --groups--> buffer.py --batches--> trainer.py --> loss.py
                        (vLLM engines) <------------------- weights.py, every k updates ------------'

Four coroutines share what `Run` holds: `search` keeps the engines full and fills the buffer; `train` updates the policy
and never waits for search; `sync` carries weights to the engines while both go on; `evaluate` asks the same engines.
With --strict `take_turns` stands for the first three. `watch.py` says what is awaited where nothing moves.
When one fails, or on Ctrl-C, all end, in this order: search and sync are cancelled, the update under way ends, a
checkpoint and the policy are saved, the task and the engines are shut down, the files are closed, the error is shown.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import checkpoint
import tasks
from buffer import EVICTION, NEAR_DUPLICATE, REPLAY, Buffer, Group, Trajectory
from config import Config, begun
from data import Order, Prompt, demonstrations, encode
from engine import import_ahead
from log import Log
from loss import OBJECTIVES
from machine import confined, cores, devices, engine_memory, pin
from scoring import Scorer
from screen import Failure, clock, printable, say
from searcher import Response, Searcher
from trackers import wanted
from watch import Watch

if TYPE_CHECKING:
    from trainer import Figures, Trainer

PROBE_TOKENS = 64  # on which engines and trainer are compared after each sync
RESPONSE, UPDATE = "response has arrived", "update has ended"  # what is watched for
BAD_UPDATES = 10  # in a row, whose loss or gradient is not finite: the run ends

# What imports torch or vLLM is imported where it is first needed, so that --help and bad input are answered at once.


class Finished(Exception):
    """Nothing is left to do; says so."""


@dataclass(frozen=True, slots=True)
class Update:
    """An update that was asked for."""

    step: int  # updates before it
    groups: list[Group]
    figures: "Figures"
    settings: dict[str, float]  # that may change from one to the next


class Run:
    """What the coroutines of a run share, and the coroutines.

    Args:
        config: the settings.

    Raises:
        ValueError: the model or the data is not there or not as it must be; says what and where.
        Finished: --resume auto finds a run that has ended.
    """

    def __init__(self, config: Config):
        for chatty in ("torchao", "torch.utils._pytree"):  # where torchao is installed
            logging.getLogger(chatty).setLevel(logging.ERROR)
        with clock("importing PyTorch and transformers", leave=False):
            self.train_device, self.search_devices = devices(config.train_device, config.search_devices)
            if "cpu" in self.search_devices and not config.dry_run and not config.plan:
                import_ahead()  # beside what comes now, which takes as long

            from transformers.utils.logging import disable_progress_bar

            from trainer import load_tokenizer

        disable_progress_bar()

        self.config, kind = config, tasks.load(config.task)
        self.out = Path(config.out or f"runs/{Path(config.task).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        if self.train_device == "cpu" and config.activation_memory_budget != 1:
            budget = config.activation_memory_budget
            raise ValueError(
                f"activation_memory_budget is {budget}: it must be 1 on the CPU, where nothing is compiled"
            )
        self.engine_memory = engine_memory(self.train_device, self.search_devices, config.gpu_memory_utilization)
        self.model = kind.model(config)
        self.tokenizer, longest = load_tokenizer(self.model, weights=not config.plan)
        self.task = kind(config, self.tokenizer)
        if config.near_duplicates == "cosine" and kind.embed is tasks.Task.embed:
            raise ValueError(f"near_duplicates is 'cosine': task {config.task} has no embeddings to compare by")
        room = longest - config.max_tokens
        self.prompts = encode(self.task.problems("train"), self.tokenizer, room)
        if len(self.prompts) < config.prompts_per_step:
            raise ValueError(f"prompts_per_step is {config.prompts_per_step}: there are {len(self.prompts)} problems")
        test = self.task.problems("test")[: config.eval_prompts] if config.eval_prompts else []
        self.test = encode(test, self.tokenizer, room) if test else []
        self.longest = max(len(prompt.tokens) for prompt in self.prompts + self.test) + config.max_tokens  # sequence
        self.demonstrations = {}
        if config.seed_data:
            self.demonstrations = demonstrations(
                config.seed_data, self.prompts, self.tokenizer, config.min_tokens, config.max_tokens
            )
        self.buffer = Buffer(
            config.capacity, EVICTION[config.evict], REPLAY[config.replay], config.seed,
            NEAR_DUPLICATE[config.near_duplicates], config.near_duplicate_distance,
            config.buffer_responses, config.buffer_gib * 2**30, config.prompts_per_step,
        )  # fmt: skip
        self.rng = random.Random(config.seed)  # of the order of problems, their temperatures and seeds
        self.order = Order(len(self.prompts), self.rng)
        self.scorer = Scorer(self.task.reward, config.reward_timeout)
        self.scoring = asyncio.Semaphore(config.reward_concurrency)
        self.step, self.before = 0, 0.0
        self.searched = self.skipped = self.bad = 0  # responses; updates whose gradient was not finite; in a row
        self.primed = asyncio.Event()
        self.reward = 0.0  # mean over the responses that search found last
        self.lock = self.resumed = None
        if begun(config.resume, config.out):
            self.lock = checkpoint.lock(self.out)
            self.resumed = self.restored()  # from this checkpoint
        self.published = self.first = self.step

        # Torch works in a thread of its own, so that the event loop stays free.
        self.train_cores, self.search_cores = cores()
        self.train_thread = ThreadPoolExecutor(1, "train", pin, (self.train_cores,))
        self.checkpoints = checkpoint.Checkpoints(self.out, config.keep)
        self.watch = Watch(config.stall_seconds, self.awaited, RESPONSE, UPDATE)
        self.stopped = 0  # the signal that ended the run
        self.searcher: Searcher | None = None  # until `start`
        self.trainer: Trainer | None = None
        self.went_on = asyncio.Event()  # just now, training or the rewards
        self.published_new = asyncio.Event()  # the staged weights are newer than the engines'
        self.synced = asyncio.Event()  # no sync is under way: the staging tensor may be written
        self.synced.set()
        self.last_sync: dict[str, float] = {}  # figures of the last sync
        self.held = False  # whether search waits for training
        self.unjudged = 0  # prompts whose responses wait for those of others to be judged
        self.found: list[Trajectory] = []  # by search since the last update
        self.made: deque[Update] = deque()  # that are not yet recorded
        self.worked = 0.0  # seconds that the trainer has worked since the last record

    def show(self) -> None:
        """Print the settings and the first prompt."""
        print(json.dumps(dataclasses.asdict(self.config), indent=2))
        print(f"\ntraining on {self.train_device}, searching on {', '.join(self.search_devices)}")
        print(f"{len(self.prompts)} training problems, {len(self.test)} test problems in an evaluation")
        first = self.prompts[0]
        seen = self.tokenizer.decode(first.tokens, clean_up_tokenization_spaces=False)
        print(f"the first prompt as the model sees it, {len(first.tokens)} tokens:\n\n{printable(seen)}")

    def open(self) -> None:
        """Make the run's folder and begin its files.

        Raises:
            ValueError: it cannot be written.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or checkpoint.lock(self.out)
            checkpoint.tidy(self.out, self.step)
            trackers = wanted(self.out, self.config, self.step)
            self.log = Log(self.out, self.config, self.step, self.before, trackers)
            for step, figures in self.log.evaluations.items():
                self.checkpoints.scores[step] = figures.get(self.task.best, math.nan)
            checkpoint.write_text(
                self.out / "config.json", json.dumps(dataclasses.asdict(self.config), indent=2) + "\n"
            )
        except OSError as error:
            raise ValueError(f"out is {str(self.out)!r}: it must be a folder that can be written ({error})") from None

    async def main(self) -> None:
        """The run from start to end."""
        with confined(self.loop_cores):
            await self._main()

    @property
    def loop_cores(self) -> set[int]:
        """The event loop's: engines on the CPU have theirs to themselves, for it takes some of the trainer's time."""
        return self.train_cores if "cpu" in self.search_devices else os.sched_getaffinity(0)

    async def _main(self) -> None:
        try:
            await self.start()
            await self.seed()
            async with asyncio.TaskGroup() as group:
                self.group, self.evaluation = group, group.create_task(asyncio.sleep(0))
                background = [group.create_task(self.watch.run())]
                if not self.step or self.evaluation_due:
                    await self.evaluate()
                self.log.start_clock()
                if self.config.strict:
                    await self.take_turns()
                else:
                    background += [group.create_task(self.search()), group.create_task(self.sync())]
                    await self.train()
                    await self.synced.wait()
                    for task in background[1:]:
                        task.cancel()
                await self.evaluation
                if self.published < self.step:
                    await self.publish()
                    await self.load_published()
                await self.evaluate()
                background[0].cancel()
        finally:
            self.end()

    async def start(self) -> None:
        """Load the policy, start the engines, hand them its weights, and see that both agree."""
        from trainer import Trainer
        from weights import share

        config, searching = self.config, ", ".join(self.search_devices)
        # One after the other: on a GPU that they share, the engine counts what is in use when it starts.
        with clock(f"loading policy{' and reference' * config.has_reference} on {self.train_device}"):
            self.trainer = await in_thread(
                self.train_thread, Trainer, self.model, OBJECTIVES[config.loss], self.train_device,
                config.temperature, config.on_policy, config.max_grad_norm, config.micro_batch_tokens,
                config.min_tokens, self.tokenizer.eos_token_id, self.resumed, config.optimizer,
                config.activation_memory_budget, config.has_reference,
            )  # fmt: skip
        self.searcher = searcher = Searcher(
            self.search_devices, config.temperature, config.max_tokens, config.min_tokens
        )
        log, seed = self.out / "engine.log", config.seed + self.step
        with clock(f"starting vLLM on {searching}"):
            await searcher.start(self.model, self.longest, seed, self.engine_memory, self.search_cores, log)
            self.trainer.staging = await share(self.trainer.policy, searcher)
            longest = max((prompt.tokens for prompt in self.prompts), key=len)
            self.probe = np.resize(longest, min(PROBE_TOKENS, self.longest - 1))  # repeated where it is shorter
            await self.publish()
            await self.load_published()
        if type(self.task).start is not tasks.Task.start:
            with clock(f"loading the task's models on {searching}"):
                await self.task.start(self.search_devices, self.search_cores, log)

    def awaited(self) -> str:
        """What is under way, in a line."""
        config, searcher, under_way = self.config, self.searcher, self.log.under_way
        searching = [
            f"{searcher.in_flight} sequences are in flight",
            f"the rewards of {len(self.order.out) - under_way['search']} prompts are awaited",
            f"the buffer has {len(self.buffer)} responses to {len(self.buffer.prompts)} prompts",
        ]
        if any(engine.replacement for engine in searcher.engines):
            searching.append("an engine that died is being replaced")
        if self.held:
            searching.append("search waits for training (--search-ahead)")
        names = {"train": "an update", "sync": "a sync", "save": "a checkpoint", "evaluate": "an evaluation"}
        training = [f"{name} is under way" for span, name in names.items() if under_way[span]]
        if not self.primed.is_set() and not config.strict and not under_way["evaluate"]:
            training.append(
                f"training waits for {config.prime} responses to {config.prompts_per_step} prompts, and has "
                f"{self.searched} to {len(self.buffer.prompts)}"
            )
        return ", ".join(searching + training)

    # ---- search ----

    async def search(self) -> None:
        """Keep the engines full: the next prompt is searched as soon as they have room for the responses to it."""
        responses = self.config.search_responses
        free = asyncio.Semaphore(max(self.searcher.slots, responses))

        async def find_and_keep(prompt_id: int) -> None:
            self.keep(prompt_id, await self.find(prompt_id, free.release))

        async with asyncio.TaskGroup() as group:
            while True:
                for _ in range(responses):
                    await free.acquire()
                await self.room()
                group.create_task(find_and_keep(next(self.order)))

    async def room(self) -> None:
        """Return when search is not too far ahead of the rewards, nor of training."""
        config = self.config
        batch = config.prompts_per_step * config.responses_per_prompt
        while True:
            allowed = max(config.prime, batch) + config.search_ahead * batch * (self.step + 1)
            ahead = self.searched + len(self.order.out) * config.search_responses
            self.held = self.primed.is_set() and ahead >= allowed
            if not self.held and self.unjudged * config.search_responses < self.searcher.slots:
                return
            await self.went_on.wait()

    async def find(self, prompt_id: int, ended: Callable[[], None] = lambda: None) -> Group | None:
        """Responses to a prompt, with their rewards. Calls `ended` as each has ended."""
        responses, version = await self.search_prompt(prompt_id, ended)
        self.unjudged += 1
        async with self.scoring:
            self.unjudged -= 1
            self.go_on()
            return await self.judge(prompt_id, responses, version)

    async def search_prompt(self, prompt_id: int, ended: Callable[[], None]) -> tuple[list[Response], int]:
        """Responses to the prompt, and the version of the weights that began them."""
        config, prompt = self.config, self.prompts[prompt_id]
        temperature = self.rng.uniform(*config.search_temperatures) if config.search_temperatures else None
        seed = self.rng.getrandbits(62) if config.strict else None  # a run can be repeated; it costs the engine time
        with self.log.span("search"):
            found = await self.searcher.generate(
                prompt.tokens, config.search_responses, temperature, not config.on_policy, seed, ended
            )
        self.watch.saw(RESPONSE)
        return found

    def go_on(self) -> None:
        """Let search go on that waited for this."""
        self.went_on.set()
        self.went_on.clear()

    async def judge(self, prompt_id: int, responses: list[Response], version: int) -> Group | None:
        """The responses with their rewards; those whose reward fails are dropped."""
        prompt = self.prompts[prompt_id]
        scored = await self.scorer(prompt.problem, self.read(responses))
        if not scored:
            return None
        trajectories = [Trajectory(r.tokens, r.finished, r.reward, version, r.logprobs) for r in scored]
        if self.config.near_duplicates == "cosine":
            embeddings = await self.scorer.guarded(self.task.embed, scored, scored)
            if embeddings is None:
                self.scorer.count(len(scored), len(scored))
                return None
            for trajectory, embedding in zip(trajectories, embeddings, strict=True):
                trajectory.embedding = embedding
        return Group(prompt_id, prompt.tokens, trajectories)

    def keep(self, prompt_id: int, group: Group | None) -> None:
        """Store what a search found, if anything is left of it."""
        if self.stopped:  # by a signal that a worker of the reward may have heard too
            return
        self.order.done(prompt_id)
        if group:
            self.buffer.add(group)
            self.found += group.responses
            self.searched += len(group.responses)
            self.prime()

    def prime(self) -> None:
        """Let training begin, if there is enough to train on."""
        if self.searched >= self.config.prime and len(self.buffer.prompts) >= self.config.prompts_per_step:
            self.primed.set()

    async def seed(self) -> None:
        """Store the demonstrations of --seed-data; a resumed run has them."""
        for prompt_id, responses in self.demonstrations.items():
            if not self.resumed and (group := await self.judge(prompt_id, responses, version=0)):
                self.buffer.add(group, newest=False)
        if self.demonstrations and not self.resumed:
            say(f"demonstrations in the buffer: {len(self.buffer)}")

    def read(self, responses: list[Response]) -> list[Response]:
        """The responses, with their texts."""
        for response, text in zip(responses, self.texts(responses), strict=True):
            response.text = text
        return responses

    def texts(self, responses: list) -> list[str]:
        """The texts of responses or trajectories."""
        return self.tokenizer.batch_decode([r.tokens for r in responses], skip_special_tokens=True)

    # ---- train ----

    async def train(self) -> None:
        """Update the policy, one update after another; only the first waits, for the buffer to be primed."""
        await self.primed.wait()
        self.recorded, self.found = (self.log.time, self.searcher.busy_seconds), []
        while not self.config.ended(self.step, self.log.time):
            await whole(self.update())
            if self.sync_due and self.synced.is_set():
                self.synced.clear()
                await self.publish()
                self.published_new.set()
            if self.evaluation_due and self.evaluation.done():  # one at a time: else this one is left out
                self.evaluation = self.group.create_task(self.evaluate())
        await whole(self.settle())

    async def take_turns(self) -> None:
        """Search B prompts, update the policy on what was found, sync, and so on: nothing at the same time."""
        self.recorded = self.log.time, self.searcher.busy_seconds

        while not self.config.ended(self.step, self.log.time):
            self.buffer.start_window()
            while missing := self.config.prompts_per_step - len(self.buffer.arrived):  # more than once if rewards fail
                async with asyncio.TaskGroup() as group:
                    turn = [(i, group.create_task(self.find(i))) for i in itertools.islice(self.order, missing)]
                for prompt_id, found in turn:  # in their order, so that a run can be repeated
                    self.keep(prompt_id, found.result())
            await whole(self.update())
            if self.sync_due:
                await self.publish()
                await self.load_published()
            if self.evaluation_due:
                await self.evaluate()
        await whole(self.settle())

    async def update(self) -> None:
        """Sample a batch, update the policy on it, and begin to save a checkpoint where one is due.

        On a GPU the update may still be under way when this returns, and is recorded after the next one has been asked
        for, so that the GPU has no need to wait for the host.

        Raises:
            Failure: update after update had no finite gradient.
        """
        config, step = self.config, self.step
        if config.reference_reset and step and step % config.reference_reset == 0:
            await in_thread(self.train_thread, self.trainer.reset_reference)
        groups = self.buffer.sample(config.prompts_per_step, config.responses_per_prompt, config.on_policy_prob)
        at = config.step_at(step, self.log.time)
        beta, lr, gamma = config.beta_at(at), config.lr_at(at), config.gamma_at(at)
        figures = await self.at_work(self.trainer.update, groups, beta, lr, gamma)
        self.made.append(Update(step, groups, figures, {"lr": lr, "beta": beta, "gamma": gamma}))
        self.step += 1
        self.go_on()
        await self.settle(under_way=1)
        if config.save_every and (self.step % config.save_every == 0 or self.evaluation_due):
            await self.settle()
            await self.save()

    async def settle(self, under_way: int = 0) -> None:
        """Record the updates that are done; at most so many may be under way."""
        while self.made and (len(self.made) > under_way or self.made[0].figures.ready):
            if not self.made[0].figures.ready:
                await self.at_work(self.made[0].figures.wait)
            self.record(self.made.popleft())

    async def at_work(self, work: Callable, *arguments):
        """What `in_thread` gives, of the trainer's; its time counts as training."""
        began = self.log.time
        with self.log.span("train"):
            result = await in_thread(self.train_thread, work, *arguments)
        self.worked += self.log.time - began
        return result

    def count_skipped(self, update: Update) -> None:
        """Count an update that was skipped because its loss or its gradient was not finite, and name its prompts."""
        groups, figures = update.groups, update.figures
        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            self.bad = 0
            return
        self.bad += 1
        self.skipped += 1
        prompts = ", ".join(f"{g.prompt_id} ({self.prompts[g.prompt_id].text[:40]!r})" for g in groups[:3])
        prompts += f" and {len(groups) - 3} more" * (len(groups) > 3)
        say(
            f"update {update.step + 1} is skipped: its loss is {figures['loss']:.4g}, the norm of its gradient "
            f"{figures['grad_norm']:.4g}; its prompts are {prompts}"
        )

    def record(self, update: Update) -> None:
        """Write an update's metrics: rates and shares are of the time since the last one's end.

        Raises:
            Failure: update after update had no finite gradient.
        """
        groups, figures = update.groups, update.figures
        self.count_skipped(update)
        since, busy = self.recorded
        self.recorded = now, busy_now = self.log.time, self.searcher.busy_seconds
        passed, found, self.found = now - since, self.found, []
        self.reward = float(np.mean([t.reward for t in found])) if found else self.reward
        worked, self.worked = self.worked, 0.0
        rates = {
            "buffer_size": len(self.buffer),
            "buffer_bytes": self.buffer.nbytes,
            "repeated": self.buffer.repeated,
            "reward_failures": self.scorer.failures,
            "skipped": self.skipped,
            "engine_restarts": self.searcher.restarts,
            "search_held": int(self.held),
            "search_tokens_per_s": sum(len(t.tokens) for t in found) / passed,
            "train_tokens_per_s": figures["tokens"] / passed,
            "search_idle": max(0.0, 1 - (busy_now - busy) / passed),
            "train_idle": max(0.0, 1 - worked / passed),
        } | self.last_sync
        prompt = self.prompts[groups[0].prompt_id].text
        given = {name: figures[name] for name in figures if name != "tokens"} | update.settings
        self.log.update(update.step, {"reward": self.reward} | given | rates, groups, prompt, self.texts)
        self.watch.saw(UPDATE)
        if self.bad >= BAD_UPDATES:
            raise Failure(
                f"{self.bad} updates in a row had no finite loss or gradient: a lower --lr may help. The newest "
                f"checkpoint is {next(iter(checkpoint.by_step(self.out).values()), 'none')}"
            )

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is, after this update; the last is `main`'s."""
        every, ended = self.config.eval_every, self.config.ended(self.step, self.log.time)
        return every > 0 and self.step % every == 0 and not ended

    # ---- checkpoints ----

    async def save(self) -> None:
        """Begin to write a checkpoint of this step, from a copy, so that training goes on; the last one ends first."""
        with self.log.span("save"):
            await self.checkpoints.idle()
            weights = await in_thread(self.train_thread, self.trainer.snapshot, self.tokenizer)
        self.checkpoints.save(self.state(), weights, self.buffer.snapshot())

    def state(self) -> dict:
        """What a checkpoint holds beside the trainer's and the buffer's; see `restored`."""
        return {
            "step": self.step,
            "time": self.log.time,
            "version": self.published,
            "order": self.order.state(),
            "searched": self.searched,
            "reward": self.reward,
            "skipped": self.skipped,
            "reward_failures": self.scorer.failures,
            "settings": dataclasses.asdict(self.config),
        }

    def restored(self) -> Path | None:
        """Take over the newest checkpoint of the run that is resumed, but for what the trainer loads from it.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        config = self.config
        found = checkpoint.newest(self.out)
        if not found:
            if config.resume == "auto":
                return None
            raise ValueError(
                f"resume is {config.resume!r}: it has no checkpoint that is whole (--resume auto begins anew)"
            )
        folder, state = found
        self.step, self.before = state["step"], state["time"]
        self.searched, self.skipped, self.reward = state["searched"], state["skipped"], state["reward"]
        if config.resume == "auto" and config.ended(self.step, self.before):
            raise Finished(f"{self.out} is done: it has made {self.step} updates in {self.before:.0f} s")
        if self.step >= config.steps:
            raise ValueError(f"steps is {config.steps}: it must be above {self.step}, the newest checkpoint's")
        self.scorer.failures = state["reward_failures"]
        try:
            self.order.restore(state["order"])
            self.buffer.restore(folder)
        except Exception as error:
            raise ValueError(f"{folder} cannot be read ({error}): move it away to go on from the one before") from error
        seen = {i: entry.tokens for i, entry in self.buffer.prompts.items()}
        for i in {*seen, *self.order.left}:
            if i >= len(self.prompts) or not np.array_equal(
                seen.get(i, self.prompts[i].tokens), self.prompts[i].tokens
            ):
                raise ValueError(f"data is {config.data!r}: its problems are not those that {folder} was made with")
        self.prime()
        return folder

    def save_last(self) -> None:
        """Write the policy, and a checkpoint of the last step; neither of what an update broke off or left no good."""
        self.checkpoints.writing.result()  # two copies may be too much for the memory
        try:
            if self.trainer and self.step and not self.trainer.stepping:
                if self.bad < BAD_UPDATES:
                    self.checkpoints.save(self.state(), self.trainer.snapshot(self.tokenizer), self.buffer.snapshot())
                checkpoint.write_folder(self.out / "model", lambda to: self.trainer.export(to, self.tokenizer))
        except Exception as error:
            self.checkpoints.failed = f"the policy of step {self.step} cannot be saved ({error})"
        self.checkpoints.end()

    # ---- sync ----

    @property
    def sync_due(self) -> bool:
        """Whether the engines' weights are k updates old."""
        return self.step - self.published >= self.config.sync_every

    async def publish(self) -> None:
        """Stage the policy's weights, and note what they give the probe."""
        async with self.searcher.writing:
            self.expected = await in_thread(self.train_thread, self.trainer.publish, self.probe, self.step)
        self.published = self.step

    async def sync(self) -> None:
        """Carry staged weights to the engines, while the trainer goes on and sequences in flight go on with them."""
        while True:
            await self.published_new.wait()
            self.published_new.clear()
            await self.load_published()
            self.synced.set()

    async def load_published(self) -> None:
        """Let the engines take the staged weights, once the copy is done, and see that they give what the policy gives.

        Raises:
            RuntimeError: they do not, by more than rounding: at the start always, later with --check-sync.
        """
        from weights import compare

        began = self.log.time
        with self.log.span("sync"):
            await asyncio.to_thread(self.trainer.staging.wait)
            await self.searcher.load_staging()
        seconds = self.log.time - began
        self.buffer.start_window()
        # What the policy gives the probe was asked for before the copy was done: it has arrived.
        agreement = await compare(self.searcher, self.probe, self.expected.numpy(), self.config.check_sync)
        self.last_sync = agreement | {"sync_ms": 1000 * seconds}

    # ---- evaluate ----

    async def evaluate(self) -> None:
        """Figures on the test problems, through the same engines, unless a resumed run has them."""
        if not self.test or self.step in self.log.evaluations:
            return
        config, step = self.config, self.step
        self.checkpoints.spare = step  # until it is known how good it is
        gate = asyncio.Semaphore(max(1, self.searcher.slots // (config.eval_samples + 1)))

        async def answer(prompt: Prompt) -> tasks.Answered:
            async with gate:
                greedy, _ = await self.searcher.generate(prompt.tokens, 1, temperature=0.0)
                samples, _ = await self.searcher.generate(
                    prompt.tokens, config.eval_samples, logprobs=self.task.evaluation_logprobs
                )
            self.watch.saw(RESPONSE)
            async with self.scoring:
                await self.scorer(prompt.problem, self.read(greedy + samples))
            return tasks.Answered(prompt.problem, prompt.tokens, greedy[0], samples)

        first = contextlib.nullcontext() if self.log.progress else clock(f"evaluating on {len(self.test)} problems")
        with first, self.log.span("evaluate"):
            figures = self.task.evaluate(await asyncio.gather(*map(answer, self.test)))
            figures = await figures if inspect.isawaitable(figures) else figures
        if self.task.best not in figures and not self.log.evaluations:
            say(f"no checkpoint is told to be the best: `evaluate` gives no {self.task.best!r} (`best` of the task)")
        self.log.evaluation(step, {name: float(value) for name, value in figures.items()})
        self.checkpoints.score(step, self.log.evaluations[step].get(self.task.best, math.nan))

    def end(self) -> None:
        """Let the update under way end, save, end the engines, close the files. None may stop the next."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self.lock.close)
            last_first.callback(self.log.close)
            if self.searcher:
                last_first.callback(self.searcher.shutdown)
            last_first.callback(self.task.end)
            last_first.callback(self.save_last)
            for update in reversed(self.made):
                last_first.callback(self.record, update)
            last_first.callback(self.train_thread.shutdown, cancel_futures=True)


async def in_thread(thread: ThreadPoolExecutor, work, *arguments):
    """The result of `work(*arguments)`, done in that thread; what it raises is raised here."""
    return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)


async def whole(work: Coroutine):
    """The result of a coroutine that is not to be cut short: where it is cancelled, it is finished first."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # has been seen, where what cancelled it is told in its stead
