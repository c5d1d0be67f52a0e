"""TBA: trajectory balance with asynchrony. Search and training side by side, in one process.

    python tba.py                                   post-train a small embedded model on Countdown, on any machine
    python tba.py --task gsm8k                      the paper's GSM8K run, on a box of GPUs
    python tba.py --task gsm8k --model DIR --data DIR --steps 100 --out runs/mine
    python tba.py --task gsm8k --help               every setting, with the task's defaults
    python tba.py --task gsm8k --dry-run            what it would do, and the first prompt as the model sees it

    tasks/ --prompts--> searcher.py --responses--> scoring.py --groups--> buffer.py --batches--> trainer.py --> loss.py
                        (vLLM engines) <------------------- weights.py, every k updates ------------'

Four coroutines share what `Run` holds: `search` keeps the engines full and fills the buffer; `train` updates the policy
and never waits for search; `sync` carries weights to the engines while both go on; `evaluate` asks the same engines.
With --strict `take_turns` stands for the first three.
When one fails all end, in this order: search and sync are cancelled, the update under way ends, the policy is saved,
the task and the engines are shut down, the files are closed, the error is shown.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import tasks
from buffer import EVICTION, NEAR_DUPLICATE, REPLAY, Buffer, Group, Trajectory
from config import Config, parse
from data import Prompt, demonstrations, encode
from log import Log, say, table
from loss import OBJECTIVES
from scoring import RewardError, Scorer
from searcher import Response, Searcher, die_with_parent

if __name__ == "__mp_main__":  # an engine's process, which imports this file when it starts
    die_with_parent()

PROBE_TOKENS = 64  # on which engines and trainer are compared after each sync

# What imports torch or vLLM is imported where it is first needed, so that --help and bad input are answered at once.


class Run:
    """What the coroutines of a run share, and the coroutines.

    Args:
        config: the settings.

    Raises:
        ValueError: the model or the data is not there or not as it must be; says what and where.
    """

    def __init__(self, config: Config):
        from machine import cores, devices, pin
        from trainer import load_tokenizer, newest_checkpoint

        self.config, kind = config, tasks.load(config.task)
        self.out = Path(config.out or f"runs/{Path(config.task).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.train_device, self.search_devices = devices(config.train_device, config.search_devices)
        self.model = kind.model(config)
        self.tokenizer, longest = load_tokenizer(self.model)
        self.task = kind(config, self.tokenizer)
        if config.near_duplicates == "cosine" and kind.embed is tasks.Task.embed:
            raise ValueError(f"near_duplicates is 'cosine': task {config.task} has no embeddings to compare by")
        room = longest - config.max_tokens
        self.prompts = encode(self.task.problems("train"), self.tokenizer, room)
        if len(self.prompts) < config.prompts_per_step:
            raise ValueError(f"prompts_per_step is {config.prompts_per_step}: there are {len(self.prompts)} problems")
        test = self.task.problems("test")[: config.eval_prompts] if config.eval_prompts else []
        self.test = encode(test, self.tokenizer, room) if test else []
        self.demonstrations = {}
        if config.seed_data:
            self.demonstrations = demonstrations(
                config.seed_data, self.prompts, self.tokenizer, config.min_tokens, config.max_tokens
            )
        self.checkpoint, self.step = newest_checkpoint(self.out) if config.resume else (None, 0)
        if self.step >= config.steps:
            raise ValueError(f"steps is {config.steps}: it must be above {self.step}, the newest checkpoint's")
        self.published = self.step

        self.buffer = Buffer(
            config.capacity, EVICTION[config.evict], REPLAY[config.replay], [config.seed, self.step],
            NEAR_DUPLICATE[config.near_duplicates], config.near_duplicate_distance,
        )  # fmt: skip
        self.rng = random.Random(f"{config.seed} {self.step}")  # of the order of problems and their temperatures
        self.scorer = Scorer(self.task.reward, config.reward_timeout)
        self.scoring = asyncio.Semaphore(config.reward_concurrency)
        # Torch works in a thread of its own, so that the event loop stays free.
        train_cores, self.search_cores = cores()
        self.train_thread = ThreadPoolExecutor(1, "train", pin, (train_cores,))
        self.searcher = self.trainer = None
        self.primed = asyncio.Event()
        self.published_new = asyncio.Event()  # the staged weights are newer than the engines'
        self.synced = asyncio.Event()  # no sync is under way: the staging tensor may be written
        self.synced.set()
        self.last_sync: dict[str, float] = {}  # figures of the last sync
        self.searched = 0
        self.reward = 0.0  # mean over the responses that search found last
        self.found: list[Trajectory] = []  # by search since the last update
        self.evaluations: dict[int, dict[str, float]] = {}

    def show(self) -> None:
        """Print the settings and the first prompt."""
        print(json.dumps(dataclasses.asdict(self.config), indent=2))
        print(f"\ntraining on {self.train_device}, searching on {', '.join(self.search_devices)}")
        print(f"{len(self.prompts)} training problems, {len(self.test)} test problems in an evaluation")
        first = self.prompts[0]
        print(f"the first prompt as the model sees it, {len(first.tokens)} tokens:\n\n{first.text}")

    def open(self) -> None:
        """Make the run's folder and begin its files.

        Raises:
            ValueError: it cannot be written.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out is {str(self.out)!r}: it must be a folder that can be written ({error})") from None
        self.log = Log(self.out, self.config.steps, self.step)
        (self.out / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    async def main(self) -> None:
        """The run from start to end."""
        try:
            await self.start()
            await self.seed()
            await self.evaluate()
            self.log.start_clock()
            async with asyncio.TaskGroup() as group:
                self.group, self.evaluation = group, group.create_task(asyncio.sleep(0))
                if self.config.strict:
                    await self.take_turns()
                else:
                    background = [group.create_task(self.search()), group.create_task(self.sync())]
                    await self.train()
                    await self.synced.wait()
                    for task in background:
                        task.cancel()
            if self.published < self.step:
                await self.publish()
                await self.load_published()
            await self.evaluate()
        finally:
            self.end()

    async def start(self) -> None:
        """Load the policy, start the engines, hand them its weights, and see that both agree."""
        from trainer import Trainer
        from weights import share

        config, began = self.config, time.perf_counter()
        say(f"training on {self.train_device}, searching on {', '.join(self.search_devices)}; starting vLLM ...")
        tokens = max(len(prompt.tokens) for prompt in self.prompts + self.test) + config.max_tokens
        # One after the other: on a GPU that they share, the engine counts what is in use when it starts.
        self.trainer = await in_thread(
            self.train_thread, Trainer, self.model, OBJECTIVES[config.loss], self.train_device,
            config.temperature, config.on_policy, config.max_grad_norm, config.micro_batch_tokens,
            config.min_tokens, self.tokenizer.eos_token_id, self.checkpoint,
        )  # fmt: skip
        self.searcher = searcher = Searcher(
            self.search_devices, config.temperature, config.max_tokens, config.min_tokens
        )
        memory = {device: 0.4 if device == self.train_device else 0.9 for device in self.search_devices}
        if config.gpu_memory_utilization:
            memory = dict.fromkeys(memory, config.gpu_memory_utilization)
        log = self.out / "engine.log"
        await searcher.start(self.model, tokens, config.seed + self.step, memory, self.search_cores, log)
        self.trainer.staging = await share(self.trainer.policy, searcher)
        await self.task.start(self.search_devices, self.search_cores, log)
        longest = max((prompt.tokens for prompt in self.prompts), key=len)
        self.probe = np.resize(longest, min(PROBE_TOKENS, tokens - 1))  # repeated where it is shorter
        await self.publish()
        await self.load_published()
        say(f"ready after {time.perf_counter() - began:.0f} s")

    # ---- search ----

    async def search(self) -> None:
        """Keep the engines full: as many prompts at a time as fit, each on its way from a request to the buffer."""
        prompts = self.shuffled_prompts()
        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, self.searcher.slots // self.config.search_responses)):
                group.create_task(self.search_some(prompts, group))

    async def search_some(self, prompts: Iterator[int], group: asyncio.TaskGroup) -> None:
        """One prompt after another; while the responses to one are scored, the next is searched."""
        for prompt_id in prompts:
            found = await self.search_prompt(prompt_id)
            await self.scoring.acquire()
            group.create_task(self.keep(*found)).add_done_callback(lambda _: self.scoring.release())

    async def search_prompt(self, prompt_id: int) -> tuple[int, list[Response], int]:
        """The prompt, responses to it, and the version of the weights that began them."""
        config, prompt = self.config, self.prompts[prompt_id]
        temperature = self.rng.uniform(*config.search_temperatures) if config.search_temperatures else None
        with self.log.span("search"):
            responses, version = await self.searcher.generate(
                prompt.tokens, config.search_responses, temperature, logprobs=not config.on_policy
            )
        return prompt_id, responses, version

    async def search_and_keep(self, prompt_id: int) -> None:
        """One after the other."""
        await self.keep(*await self.search_prompt(prompt_id))

    async def keep(self, prompt_id: int, responses: list[Response], version: int, newest: bool = True) -> None:
        """Score responses and store them; those whose reward fails are dropped."""
        prompt, config = self.prompts[prompt_id], self.config
        scored = await self.scorer(prompt.problem, self.read(responses))
        if not scored:
            return
        trajectories = [Trajectory(r.tokens, r.finished, r.reward, version, r.logprobs) for r in scored]
        if config.near_duplicates == "cosine":
            embeddings = await self.scorer.guarded(self.task.embed, scored, scored)
            if embeddings is None:
                return self.scorer.count(len(scored), len(scored))
            for trajectory, embedding in zip(trajectories, embeddings, strict=True):
                trajectory.embedding = embedding
        self.buffer.add(Group(prompt_id, prompt.tokens, trajectories), newest)
        if newest:
            self.found += trajectories
            self.searched += len(trajectories)
            if self.searched >= config.prime and len(self.buffer.prompts) >= config.prompts_per_step:
                self.primed.set()

    async def seed(self) -> None:
        """Store the demonstrations of --seed-data."""
        for prompt_id, responses in self.demonstrations.items():
            await self.keep(prompt_id, responses, version=self.step, newest=False)
        if self.demonstrations:
            say(f"demonstrations in the buffer: {len(self.buffer)}")

    def shuffled_prompts(self) -> Iterator[int]:
        """Ids of the training prompts without end, in a new order each time round."""
        order = list(range(len(self.prompts)))
        while True:
            self.rng.shuffle(order)
            yield from order

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
            await self.update()
            if self.sync_due and self.synced.is_set():
                self.synced.clear()
                await self.publish()
                self.published_new.set()
            if self.evaluation_due and self.evaluation.done():  # one at a time: else this one is left out
                self.evaluation = self.group.create_task(self.evaluate())

    async def take_turns(self) -> None:
        """Search B prompts, update the policy on what was found, sync, and so on: nothing at the same time."""
        prompts = self.shuffled_prompts()
        self.recorded = self.log.time, self.searcher.busy_seconds
        while not self.config.ended(self.step, self.log.time):
            self.buffer.start_window()
            while missing := self.config.prompts_per_step - len(self.buffer.arrived):  # more than once if rewards fail
                async with asyncio.TaskGroup() as group:
                    for prompt_id in itertools.islice(prompts, missing):
                        group.create_task(self.search_and_keep(prompt_id))
            await self.update()
            if self.sync_due:
                await self.publish()
                await self.load_published()
            if self.evaluation_due:
                await self.evaluate()

    async def update(self) -> None:
        """Sample a batch, update the policy on it, record it, and save a checkpoint where one is due."""
        config, step = self.config, self.step
        if config.reference_reset and step and step % config.reference_reset == 0:
            await in_thread(self.train_thread, self.trainer.reset_reference)
        groups = self.buffer.sample(config.prompts_per_step, config.responses_per_prompt, config.on_policy_prob)
        at = config.step_at(step, self.log.time)
        beta, lr, gamma = config.beta_at(at), config.lr_at(at), config.gamma_at(at)
        began = self.log.time
        with self.log.span("train"):
            figures = await in_thread(self.train_thread, self.trainer.update, groups, beta, lr, gamma)
        self.record(groups, figures | {"lr": lr, "beta": beta, "gamma": gamma}, self.log.time - began)
        if config.save_every and self.step % config.save_every == 0:
            await in_thread(self.train_thread, self.save)

    def record(self, groups: list[Group], figures: dict, worked: float) -> None:
        """Count an update and write its metrics: rates and shares are of the time since the last update's end."""
        since, busy = self.recorded
        self.recorded = now, busy_now = self.log.time, self.searcher.busy_seconds
        passed, found, self.found = now - since, self.found, []
        self.reward = float(np.mean([t.reward for t in found])) if found else self.reward
        trained = figures.pop("tokens")
        rates = {
            "buffer_size": len(self.buffer),
            "repeated": self.buffer.repeated,
            "reward_failures": self.scorer.failures,
            "search_tokens_per_s": sum(len(t.tokens) for t in found) / passed,
            "train_tokens_per_s": trained / passed,
            "search_idle": max(0.0, 1 - (busy_now - busy) / passed),
            "train_idle": max(0.0, 1 - worked / passed),
        } | self.last_sync
        prompt = self.prompts[groups[0].prompt_id].text
        self.log.update(self.step, {"reward": self.reward} | figures | rates, groups, prompt, self.texts)
        self.step += 1

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is, after this update; the last is `main`'s."""
        every, ended = self.config.eval_every, self.config.ended(self.step, self.log.time)
        return every and self.step % every == 0 and not ended

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        folder = self.out / "checkpoints" / f"step-{self.step}"
        if not folder.exists():
            self.trainer.save(folder, self.tokenizer)

    # ---- sync ----

    @property
    def sync_due(self) -> bool:
        """Whether the engines' weights are k updates old."""
        return self.step - self.published >= self.config.sync_every

    async def publish(self) -> None:
        """Stage the policy's weights, and note what they give the probe."""
        self.expected = await in_thread(self.train_thread, self.trainer.publish, self.probe)
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
        from weights import AGREE, compare

        began = self.log.time
        with self.log.span("sync"):
            await asyncio.to_thread(self.trainer.staging.wait)
            await self.searcher.load_staging(self.published)
        seconds = self.log.time - began
        self.buffer.start_window()
        limit = AGREE[self.trainer.staging.flat.dtype] if self.config.check_sync or not self.last_sync else float("inf")
        self.last_sync = await compare(self.searcher, self.probe, self.expected, limit) | {"sync_ms": 1000 * seconds}

    # ---- evaluate ----

    async def evaluate(self) -> None:
        """Figures on the test problems, through the same engines."""
        if not self.test:
            return
        config, step = self.config, self.step
        gate = asyncio.Semaphore(max(1, self.searcher.slots // (config.eval_samples + 1)))

        async def answer(prompt: Prompt) -> tasks.Answered:
            async with gate:
                greedy, _ = await self.searcher.generate(prompt.tokens, 1, temperature=0.0)
                samples, _ = await self.searcher.generate(
                    prompt.tokens, config.eval_samples, logprobs=self.task.evaluation_logprobs
                )
            async with self.scoring:
                await self.scorer(prompt.problem, self.read(greedy + samples))
            return tasks.Answered(prompt.problem, prompt.tokens, greedy[0], samples)

        with self.log.span("evaluate"):
            figures = self.task.evaluate(await asyncio.gather(*map(answer, self.test)))
            figures = await figures if inspect.isawaitable(figures) else figures
        self.evaluations[step] = {name: float(value) for name, value in figures.items()}
        self.log.evaluation(step, self.evaluations[step])

    def end(self) -> None:
        """Let the update under way end, save the policy, end the engines, close the files. None may stop the next."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self.log.close)
            if self.searcher:
                last_first.callback(self.searcher.shutdown)
            last_first.callback(self.task.end)
            if self.trainer and self.step:
                last_first.callback(self.trainer.export, self.out / "model", self.tokenizer)
            last_first.callback(self.train_thread.shutdown, cancel_futures=True)


async def in_thread(thread: ThreadPoolExecutor, work, *arguments):
    """The result of `work(*arguments)`, done in that thread; what it raises is raised here."""
    return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)


def main() -> int:
    """The command line. Returns the exit code: 0, 1 on failure, 2 on bad input, 130 or 143 when interrupted."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        run = Run(parse(sys.argv[1:]))
        if run.config.dry_run:
            run.show()
            return 0
        run.open()
    except ValueError as error:
        print(f"tba: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    code = 0
    try:
        asyncio.run(interruptible(run))
    except (KeyboardInterrupt, asyncio.CancelledError) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else 143
    except BaseException as error:
        code, cause = 1, first_cause(error)
        if isinstance(cause, RewardError):
            print(f"tba: {cause}", file=sys.stderr)
        else:
            traceback.print_exception(cause)
            print(f"tba: what vLLM printed is in {run.out}/engine.log", file=sys.stderr)
    if run.evaluations:
        say(f"\n{table(run.evaluations)}\n")
    ended = "stopped at" if code else "done:"
    say(f"{ended} step {run.step}; metrics, samples and the policy (model/) are in {run.out}/")
    return code


async def interruptible(run: Run) -> None:
    """The run, which ends as on Ctrl-C when it is asked to terminate."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await run.main()


def first_cause(error: BaseException) -> BaseException:
    """Of the errors that ended the coroutines together, the one that came first."""
    return first_cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


if __name__ == "__main__":
    sys.exit(main())
