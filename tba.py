"""Trajectory Balance with Asynchrony (https://arxiv.org/abs/2503.18929): search and training at the same time.

    tasks/ --prompts--> search/ --responses--> rewards/ --groups--> buffer.py --B x K--> train/ --> loss.py
                     (vLLM engines) <--------------- weights, every k updates ---------------'

    python tba.py                        post-train a small embedded model on Countdown, on any machine
    python tba.py --task gsm8k           the paper's GSM8K run, on a box of GPUs (--help: every setting)
    python tba.py --resume runs/NAME     go on from the newest checkpoint

Trajectory balance holds whichever policy wrote a response, so neither side waits for the other: search keeps the
engines full, training takes what the buffer has, weights are synced while both go on. vLLM engines are processes, the
trainer is a thread, four coroutines are the algorithm. Where it differs from the paper's code, and why:

1. One buffer in memory, where the paper sends pickled buffers between ranks: nothing is sent twice.
2. Responses in flight go on under new weights, where the paper's searchers idle at each sync.
3. A response has the version of the weights that began it, so that its age is known; the paper's has its arrival's.
4. The loss is scaled by beta/2 and its gradient clipped: it does not grow as beta is annealed (loss.py).
5. Search pauses when it is too far ahead of training: responses that nobody trains on are not generated.
"""

import asyncio
import contextlib
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from buffer import Group
from rewards.guard import Rewards
from run import cli, start, state
from run.console import Watchdog, timed
from run.devices import cpu_affinity
from run.prompts import Prompt
from run.setup import Setup
from search.process import pin_thread
from search.searcher import Searcher
from tasks import Answered

if TYPE_CHECKING:
    from train.trainer import Trainer
    from train.transfer import HostCopy


class TBA:
    """Four coroutines: search, train, sync and evaluate. With --strict, search and training take turns."""

    def __init__(self, setup: Setup, trainer: "Trainer", thread: ThreadPoolExecutor, searcher: Searcher):
        self.setup, self.config, self.task, self.prompts = setup, setup.config, setup.task, setup.prompts
        self.trainer, self.thread, self.searcher = trainer, thread, searcher
        self.rewards = Rewards(setup.task, setup.tokenizer, setup.config)
        self.buffer, self.metrics, self.checkpoints = setup.buffer, setup.metrics, setup.checkpoints
        self.sampler, self.probe = setup.sampler, setup.probe  # which prompt is searched next; tokens to compare on
        self.watchdog = Watchdog(self.config.stall_seconds, lambda: state.status(self))
        self.progress, self.paused = state.Progress(), False  # paused: search waits for training
        self.pending: tuple | None = None  # the last update, until its figures are there: a GPU never idles for them
        self.sync_figures: dict[str, float] = {}  # of the last sync
        self.syncing = self.evaluating = asyncio.ensure_future(asyncio.sleep(0))  # in the background, one of each
        self.changed = asyncio.Event()  # for `until`
        if setup.resume:
            state.load_state_dict(self, setup.state)

    # ---- search: prompt -> S responses -> rewards -> buffer ----

    async def search(self) -> None:
        """Search prompt after prompt: keep the engines full, and stay within --search-ahead of training."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self.until(lambda: not self.too_far_ahead() and not self.full())
                group.create_task(self.search_prompt(next(self.sampler)))

    async def search_prompt(self, prompt_id: int) -> None:
        self.store(await self.rollout(prompt_id))

    async def rollout(self, prompt_id: int) -> Group:
        """S responses to a prompt with their rewards, without those whose reward failed."""
        prompt, config, rng = self.prompts[prompt_id], self.config, self.sampler.rng
        temperature = rng.uniform(*config.search_temperatures) if config.search_temperatures else None
        seed = rng.getrandbits(62) if config.strict else None  # to repeat a run; seeds cost the engines time
        sampling: dict[str, Any] = {"temperature": temperature, "seed": seed, "logprobs": config.reads_behaviour}
        with self.metrics.span("search"):
            responses = await self.searcher.generate(prompt.tokens, config.search_responses, **sampling)
        self.watchdog.beat("response")
        return Group(prompt_id, prompt.tokens, await self.rewards(prompt.problem, responses))

    def store(self, group: Group) -> None:
        """Store the responses to a prompt, if any are left: they are the newest data."""
        self.sampler.done(group.prompt_id)
        if group.responses:
            self.buffer.add(group)
            self.metrics.add(group.responses)
            self.progress.responses += len(group.responses)
        self.notify()

    def too_far_ahead(self) -> bool:
        """Whether search has requested --search-ahead times what the updates so far and the next take, and `prime`."""
        config, batch = self.config, self.config.prompts_per_step * self.config.responses_per_prompt
        requested = self.progress.responses + len(self.sampler.in_flight) * config.search_responses
        allowed = max(config.prime, batch) + config.search_ahead * batch * (self.progress.step + 1)
        self.paused = self.primed() and requested >= allowed
        return self.paused

    def full(self) -> bool:
        """Whether twice as many responses are requested as engines have in flight: half queue."""
        return len(self.sampler.in_flight) >= max(1, 2 * self.searcher.slots // self.config.search_responses)

    # ---- train: B prompts x K responses -> one update ----

    async def train(self) -> None:
        """Update after update; the first waits for data. Start syncs and evaluations, which go on in the background."""
        await self.until(self.primed)
        self.metrics.mark()
        while not self.done():
            await cli.uninterrupted(self.update())
            if self.sync_due() and self.syncing.done():
                self.syncing = self.group.create_task(self.sync(await self.stage()))
            if self.evaluation_due() and self.evaluating.done():
                self.evaluating = self.group.create_task(self.evaluate())
        await cli.uninterrupted(self.record())

    async def update(self) -> None:
        """Sample a batch and take an optimiser step; start to save a checkpoint where one is due."""
        config, step = self.config, self.progress.step
        if config.reference_reset and step and step % config.reference_reset == 0:
            await self.in_trainer(self.trainer.reset_reference)
        groups = self.buffer.sample(config.prompts_per_step, config.responses_per_prompt, config.on_policy_prob)
        schedule = config.schedule(step, self.metrics.seconds)  # lr, beta, gamma
        with self.metrics.span("train"):
            figures = await self.in_trainer(self.trainer.update, groups, **schedule)  # on a GPU: enqueued, not done
        self.progress.step += 1
        self.notify()
        await self.record()  # the update before
        self.pending = step, groups, schedule, figures
        save_due = config.save_every and (self.progress.step % config.save_every == 0 or self.evaluation_due())
        if figures.ready or save_due:
            await self.record()
        if save_due:
            await state.save(self)

    async def record(self) -> None:
        """Wait for the figures of the pending update, and write its metrics."""
        if self.pending:
            (step, groups, schedule, figures), self.pending = self.pending, None
            if not figures.ready:
                with self.metrics.span("train"):
                    await self.in_trainer(figures.result)
            gauges = self.buffer.gauges() | self.rewards.gauges() | self.searcher.gauges() | self.sync_figures
            figures = figures.result() | schedule | gauges | {"search_paused": int(self.paused)}
            self.watchdog.beat("update")
            self.metrics.update(step, groups, figures, self.prompts)

    # ---- sync: the policy's weights -> the engines ----

    async def stage(self) -> "HostCopy":
        """Copy the weights to where the engines load them from; returns the policy's log-probabilities of the probe."""
        async with self.searcher.weights_lock:
            return await self.in_trainer(self.trainer.stage, self.searcher.weights, self.probe, self.progress.step)

    async def sync(self, expected: "HostCopy") -> None:
        """Let the engines load the staged weights. A RunError where they and the trainer then disagree on the probe."""
        with self.metrics.span("sync") as span:
            await asyncio.to_thread(self.searcher.weights.wait)
            await self.searcher.load_weights()  # between two steps: responses in flight go on under them
        self.progress.engine_step = self.searcher.weights.version
        self.buffer.start_window()  # responses that arrive from now on are the newest data
        logprobs = await asyncio.to_thread(expected.numpy)
        agreement = await self.searcher.check_agreement(self.probe, logprobs, self.config.check_sync)
        self.sync_figures = agreement | {"sync_ms": 1000 * span.seconds}

    # ---- evaluate: the test prompts, by the same engines ----

    async def evaluate(self) -> None:
        """Evaluate the policy that the engines have on the test prompts, unless a resumed run has done so."""
        step = self.progress.step
        if self.setup.test_prompts and step not in self.metrics.evaluations:
            self.checkpoints.protected = step  # until its score is known
            await asyncio.wait({self.syncing})  # to begin with the newest weights
            room = asyncio.Semaphore(max(1, self.searcher.slots // (self.config.eval_samples + 1)))
            with self.metrics.span("evaluate"):
                answers = await asyncio.gather(*(self.answer(prompt, room) for prompt in self.setup.test_prompts))
                figures = self.task.evaluate(answers)
                figures = await figures if inspect.isawaitable(figures) else figures
            self.metrics.evaluation(step, figures)
            self.checkpoints.score(step, figures, self.task.best)

    async def answer(self, prompt: Prompt, room: asyncio.Semaphore) -> Answered:
        """A greedy response to a test prompt and sampled ones, with their rewards (nan where one fails)."""
        k, logprobs, version = self.config.eval_samples, self.task.evaluation_logprobs, self.progress.engine_step
        async with room:
            generate = functools.partial(self.searcher.generate, prompt.tokens, version=version)
            greedy, samples = await asyncio.gather(generate(1, temperature=0.0), generate(k, logprobs=logprobs))
        self.watchdog.beat("response")
        await self.rewards(prompt.problem, greedy + samples)
        return Answered(prompt.problem, prompt.tokens, greedy[0], samples)

    async def run(self) -> None:
        """Sync and evaluate; search and train, with syncs and evaluations beside; sync and evaluate."""
        await self.sync(await self.stage())
        await state.add_demonstrations(self)
        async with asyncio.TaskGroup() as self.group:
            watching = self.group.create_task(self.watchdog.run())
            if not self.progress.step or self.evaluation_due():
                await self.evaluate()
            self.metrics.start_clock()
            if self.config.strict:
                await self.take_turns()
            else:
                searching = self.group.create_task(self.search())
                await self.train()
                searching.cancel()
            await asyncio.wait({self.syncing, self.evaluating})
            if self.progress.engine_step < self.progress.step:
                await self.sync(await self.stage())
            await self.evaluate()
            watching.cancel()

    async def take_turns(self) -> None:
        """Search B prompts, update on their responses, sync, and so on: nothing at the same time (--strict)."""
        while not self.done():
            self.buffer.start_window()
            while missing := self.config.prompts_per_step - len(self.buffer.window):  # again where rewards fail
                async with asyncio.TaskGroup() as group:
                    rollouts = [group.create_task(self.rollout(next(self.sampler))) for _ in range(missing)]
                for rollout in rollouts:  # in the order of the prompts, so that a run can be repeated
                    self.store(rollout.result())
            await cli.uninterrupted(self.update())
            if self.sync_due():
                await self.sync(await self.stage())
            if self.evaluation_due():
                await self.evaluate()
        await cli.uninterrupted(self.record())

    # ---- conditions, and how they are waited for ----

    def primed(self) -> bool:
        """Whether the buffer has enough for training to begin."""
        responses, prompts = self.progress.responses, len(self.buffer.prompts)
        return responses >= self.config.prime and prompts >= self.config.prompts_per_step

    def done(self) -> bool:
        """Whether training has ended."""
        return self.config.done(self.progress.step, self.metrics.seconds)

    def sync_due(self) -> bool:
        """Whether the engines' weights are k updates old."""
        return self.progress.step - self.progress.engine_step >= self.config.sync_every

    def evaluation_due(self) -> bool:
        """Whether an evaluation follows this update; the one after the last update is `run`'s."""
        every = self.config.eval_every
        return bool(every) and self.progress.step % every == 0 and not self.done()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which is tested after each `notify`."""
        while not condition():
            await self.changed.wait()

    def notify(self) -> None:
        """Wake those who wait in `until`: responses were stored, or an update was made."""
        self.changed.set()
        self.changed.clear()

    async def in_trainer(self, work: Callable, *arguments, **settings) -> Any:
        """The result of work in the trainer's thread, so that the event loop stays free."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, lambda: work(*arguments, **settings))


@contextlib.asynccontextmanager
async def started(setup: Setup) -> AsyncIterator[TBA]:
    """The parts of a run, started one after the other; they end in the reverse order, whatever happens."""
    from search.weights import StagedWeights

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(cpu_affinity(setup.loop_cores))
        for opened in (setup.lock, setup.metrics, setup.checkpoints):
            stack.enter_context(opened)
        thread = stack.enter_context(ThreadPoolExecutor(1, "train", pin_thread, (setup.train_cores,)))
        with timed(f"loading the policy on {', '.join(setup.train_devices)}"):  # first: engines take what is left
            load = stack.enter_context(start.trainer(setup))
            trainer = await asyncio.get_running_loop().run_in_executor(thread, load)
        with timed(f"starting vLLM on {', '.join(setup.search_devices)}"):
            weights = StagedWeights(trainer.layout, setup.search_devices, trainer.policy.dtype, trainer.device)
            searcher = await stack.enter_async_context(start.searcher(setup, weights))
        await stack.enter_async_context(setup.task.serving(setup))
        yield TBA(setup, trainer, thread, searcher)


async def main(setup: Setup) -> None:
    """Run from start to end. Cancelled or failed, it finishes the update under way, and saves."""
    async with started(setup) as tba:
        try:
            await tba.run()
        finally:
            await cli.uninterrupted(state.save_last(tba))


if __name__ == "__main__":
    sys.exit(cli.start(main))
