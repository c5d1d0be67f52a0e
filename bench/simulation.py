"""A run on a cluster, simulated by events: what `bench.scale` says of machines that are not here.

It has the run's own buffer and rules: search pauses beyond --search-ahead, engines admit requests as sequences end, a
response has the version that began it, a sync is due every k updates, and the trainer takes B x K responses whenever it
is free. A sync copies the weights to the host, while training waits, and puts them into the object store; each node
pulls them once, its engines load them between two steps, and it takes the newest then, if that is another.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from buffer import Buffer, Group, Response
from config import Config

NODE = 8  # engines


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds and tokens."""

    step: float  # seconds of an engine's step, beside
    sequence: float  # those for each sequence in flight
    update: float  # seconds
    stage: float  # seconds of a copy of the weights by way of the host: to stage, to put, to load
    pull: float  # seconds of a node that has the head's link for itself
    tokens: tuple[float, float]  # of a response, mean and standard deviation


class Shared:
    """Jobs that progress alike, by what they share: sequences of an engine, nodes that pull over a link.

    Args:
        run: has the clock.
        seconds: that a unit of each of so many jobs takes.
    """

    def __init__(self, run: "Run", seconds: Callable[[int], float]):
        self.run, self.seconds = run, seconds
        self.jobs: list[tuple[float, int, Callable]] = []  # (where `done` is at its end, -, what is called then)
        self.waiting: deque[Group] = deque()  # requests of an engine
        self.done = self.last = 0.0  # units of a job that was there from the start, at this time
        self.planned = 0

    def add(self, jobs: Iterable[tuple[float, Callable]]) -> None:
        """Begin jobs, of (units, what is called at the end)."""
        self.advance()
        for units, end in jobs:
            heapq.heappush(self.jobs, (self.done + units, next(self.run.numbers), end))
        self.plan()

    def stop(self, seconds: float) -> None:
        """Let nothing progress for so long."""
        self.advance()
        self.last += seconds
        self.plan()

    def advance(self) -> None:
        """Note the progress until now."""
        if self.jobs and self.run.now > self.last and (seconds := self.seconds(len(self.jobs))):
            self.done += (self.run.now - self.last) / seconds
        self.last = max(self.last, self.run.now)

    def plan(self) -> None:
        """Plan the next end of a job, in the place of the one that was planned."""
        self.planned = next(self.run.numbers)
        if self.jobs:
            left = max(0.0, self.jobs[0][0] - self.done) * self.seconds(len(self.jobs))
            self.run.after(self.last - self.run.now + left, partial(self.end, self.planned))

    def end(self, planned: int) -> None:
        """End the first job, unless another end was planned since."""
        if planned == self.planned:
            self.advance()
            self.done, _, called = heapq.heappop(self.jobs)
            self.plan()
            called()


class Run:
    """A run of `config.steps` updates, with so many engines that have so many sequences in flight each."""

    def __init__(self, costs: Costs, config: Config, engines: int, slots: int, prompts: int = 7473):
        self.costs, self.config, self.slots, self.prompts = costs, config, slots, prompts
        self.rng, self.numbers = np.random.default_rng(0), itertools.count()
        self.events: list[tuple[float, int, Callable]] = []
        self.engines = [Shared(self, lambda n: costs.step + costs.sequence * n) for _ in range(engines)]
        self.link = Shared(self, lambda n: n * costs.pull)
        self.versions = [0] * -(-engines // NODE)  # of each node's weights
        self.pulling: set[int] = set()  # nodes
        self.buffer = Buffer(config.capacity)
        self.step = self.published = self.requested = 0  # requested: prompts
        self.now = self.began = self.pausing = self.paused_at = 0.0
        self.training = self.syncing = self.paused = False
        self.stored: list[tuple[float, Response]] = []  # when
        self.trained: set[Response] = set()
        self.ages: list[list[int]] = []  # of each batch
        self.search()
        while self.step < config.steps:
            self.now, _, do = heapq.heappop(self.events)
            do()

    def after(self, seconds: float, do: Callable) -> None:
        """Do something in so many seconds."""
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), do))

    # ---- search: as `TBA.search`, and `Worker` of search/worker.py ----

    def search(self) -> None:
        """Request responses while engines can take them, unless too far ahead of training."""
        S, batch = self.config.search_responses, self.config.prompts_per_step * self.config.responses_per_prompt
        allowed = max(self.config.prime, batch) + self.config.search_ahead * batch * (self.step + 1)
        while True:
            self.pausing += self.paused * (self.now - self.paused_at)
            self.paused, self.paused_at = self.training and self.requested * S >= allowed, self.now
            in_flight = self.requested - len(self.stored) // S
            if self.paused or in_flight >= max(1, 2 * self.slots * len(self.engines) // S):
                return
            engine = min(range(len(self.engines)), key=lambda i: self.in_flight(self.engines[i]))
            self.engines[engine].waiting.append(Group(self.requested % self.prompts, np.zeros(1, np.int32), []))
            self.requested += 1
            self.admit(engine)

    def in_flight(self, engine: Shared) -> int:
        """Responses that were requested of it and have not come."""
        return len(engine.jobs) + self.config.search_responses * len(engine.waiting)

    def admit(self, i: int) -> None:
        """Begin the requests that an engine has room for."""
        (mean, std), S, engine = self.costs.tokens, self.config.search_responses, self.engines[i]
        while engine.waiting and len(engine.jobs) < self.slots:
            group = engine.waiting.popleft()
            lengths = self.rng.gamma((mean / std) ** 2, std**2 / mean, S) if std else np.full(S, mean)
            some = [Response(np.array([next(self.numbers)]), True, self.versions[i // NODE], 0.0) for _ in range(S)]
            ends = (partial(self.generated, i, group, response) for response in some)
            engine.add(zip(np.maximum(lengths, 1).tolist(), ends, strict=True))

    def generated(self, i: int, group: Group, response: Response) -> None:
        """A response came; those to a prompt are stored together."""
        group.responses.append(response)
        if len(group.responses) == self.config.search_responses:
            self.buffer.add(group)
            self.stored += [(self.now, each) for each in group.responses]
            enough = len(self.stored) >= self.config.prime
            if not self.training and enough and len(self.buffer.prompts) >= self.config.prompts_per_step:
                self.training, self.began = True, self.now
                self.train()
            self.search()
        self.admit(i)

    # ---- training and syncs: as `TBA.train`, and `ElasticSearcher` of search/remote.py ----

    def train(self) -> None:
        """Begin an update."""
        config = self.config
        groups = self.buffer.sample(config.prompts_per_step, config.responses_per_prompt, config.on_policy_prob)
        batch = [response for group in groups for response in group.responses]
        self.trained.update(batch)
        self.ages.append([self.step - response.version for response in batch])
        self.after(self.costs.update, self.updated)

    def updated(self) -> None:
        """An update is made: begin a sync where one is due, or the next update."""
        self.step += 1
        self.search()
        if self.step - self.published >= self.config.sync_every and not self.syncing:
            self.syncing = True
            self.after(self.costs.stage, partial(self.staged, self.step))
        else:
            self.train()

    def staged(self, version: int) -> None:
        """Training goes on, while the weights are put into the object store."""
        self.after(self.costs.stage, partial(self.put, version))
        self.train()

    def put(self, version: int) -> None:
        """Nodes can pull the weights."""
        self.published, self.syncing = version, False
        self.buffer.start_window()
        for node in range(len(self.versions)):
            self.pull(node)

    def pull(self, node: int) -> None:
        """Let a node pull the newest weights, unless it does something else."""
        if node not in self.pulling and self.versions[node] < self.published:
            self.pulling.add(node)
            self.link.add([(1, partial(self.pulled, node, self.published))])

    def pulled(self, node: int, version: int) -> None:
        """The engines of a node load the weights, and generate nothing meanwhile."""
        for engine in self.engines[node * NODE :][:NODE]:
            engine.stop(self.costs.stage)
        self.after(self.costs.stage, partial(self.loaded, node, version))

    def loaded(self, node: int, version: int) -> None:
        """What the engines of a node begin from now on has this version."""
        self.versions[node] = version
        self.pulling.remove(node)
        self.pull(node)

    def figures(self) -> dict[str, float]:
        """What the columns of `bench.scale` say."""
        passed, pausing = self.now - self.began, self.pausing + self.paused * (self.now - self.paused_at)
        shares = {"trainer idle": 1 - self.step * self.costs.update / passed, "search paused": pausing / passed}
        figures = figures_of(self.stored, self.trained, self.ages, self.began, passed)
        return {"searchers": len(self.engines)} | figures | shares


def figures_of(stored: list, trained: set[Response], ages: list[list[int]], began: float, passed: float) -> dict:
    """The columns that are made of responses.

    Args:
        stored: (when, response) of those that search generated.
        trained: those that were in a batch.
        ages: of the responses of each batch, in updates.
        began, passed: when training began, and for how many seconds it went on.
    """
    middle = [each for at, each in stored if 0.25 <= (at - began) / passed <= 0.75]
    late = np.concatenate(ages[len(ages) // 2 :])
    return {
        "responses/s": sum(at > began for at, _ in stored) / passed,
        "trained on": sum(each in trained for each in middle) / max(1, len(middle)),
        "age": float(late.mean()),
        "age, median": float(np.median(late)),
        "age, 95 %": float(np.quantile(late, 0.95)),
    }
