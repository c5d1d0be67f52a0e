"""Engines on a Ray cluster, which join and leave while the run goes on. Only cluster.py, host.py and this import Ray.

An engine is an actor (host.py). A sync puts the staged weights into Ray's object store, once: each node pulls them
once, its actors map them and load, each when it can, and nothing waits for them. One actor is requested for each engine
that may be; Ray places it when the cluster has room, and it joins when it and the trainer agree. Where its node goes,
what was in flight on it is requested of another engine, and the actor is requested anew.
"""

import asyncio
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from config import RunError
from search.cluster import actor, found_there, has
from search.engine import CALL_SECONDS, EngineDied, EngineSettings
from search.host import EngineHost
from search.searcher import Searcher
from search.weights import StagedWeights

RETRY_SECONDS = 2, 60  # between the end of an engine and the next in its place: at first, and at most
PROBES = 256  # syncs after which engines can still be compared: some load while several go by

log = logging.getLogger("tba")


class RemoteEngine:
    """An engine on the cluster, with what `search.engine.Engine` has."""

    def __init__(self, settings: EngineSettings, group: int):
        self.settings, self.group = settings, group  # of `ElasticSearcher.groups`
        self.in_flight, self.agreed, self.difference, self.dead = 0, False, (0.0, 0.0), False
        self.version, self.node = -1, "the cluster"  # of its weights, and where it is
        self.actor = actor(EngineHost, settings.device == "cuda", max_concurrency=10_000)

    async def start(self) -> None:
        """Wait until the cluster has room for it, and vLLM can be called. A RuntimeError says why it cannot."""
        try:
            self.node = f"node {await self._answer(self.actor.start, self.settings)}"
        except RuntimeError as error:
            raise RuntimeError(f"vLLM gave up: {error}; Ray's logs on its node have all that it printed") from error

    async def call(self, method: str, *arguments) -> Any:
        """The result of a method of `Worker`. Raises EngineDied, or a RuntimeError where the method raised."""
        return pickle.loads(await self._answer(self.actor.call, method, *arguments))

    async def load_weights(self, version: int, handle: dict, flat: ray.ObjectRef) -> None:
        """Load weights that are in the object store."""
        await self._answer(self.actor.load_weights, version, handle, flat)
        self.version = version

    async def ended(self) -> None:
        """Wait until it has died, and raise EngineDied."""
        try:
            await self._answer(self.actor.wait)
        except RuntimeError as error:
            raise EngineDied(str(error)) from error

    def end(self) -> None:
        """End it, at once."""
        self.dead = True
        ray.kill(self.actor)

    async def _answer(self, method: Any, *arguments) -> Any:
        reference = method.remote(*arguments)
        try:
            return await reference
        except (RayTaskError, RuntimeEnvSetupError) as error:  # the method raised, or no process could be made for it
            cause = getattr(error, "cause", error)
            raise RuntimeError(" ".join(f"{type(cause).__name__}: {cause}".split())) from error
        except RayError as error:  # its process has ended, its node cannot be reached, or the call is lost
            self.end()  # so that `ended` says it too: one that lives on, and is asked nothing, would not be replaced
            why = "it died" if isinstance(error, RayActorError) else " ".join(str(error).split()).partition(". ")[0]
            raise EngineDied(why) from error
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise


class ElasticSearcher(Searcher):
    """A searcher that has engines on a cluster too.

    Args:
        engines: of this machine.
        groups: settings of engines on the cluster, how many of them there must be at first, and how many may be.
        yielding: request them at the first sync, when judges have their places on the cluster, and not at once.
        weights, sampling: as of `Searcher`.
    """

    def __init__(
        self, engines: Sequence[EngineSettings], groups: Sequence[tuple[EngineSettings, int, int]],
        yielding: bool, weights: StagedWeights, **sampling,
    ):  # fmt: skip
        super().__init__(engines, weights, **sampling)
        self.groups, self.yielding = groups, yielding
        self.published: tuple[int, Any] = (-1, None)  # the version of the newest weights, and the object that has them
        self.probes: dict[int, tuple[list[int], np.ndarray]] = {}  # by version: tokens, and the trainer's log-probs
        self.strict = False  # of `check_agreement`
        self.began = False  # whether as many engines as there must be have been there
        self.failure: RunError | None = None
        self.changed = asyncio.Event()  # for `_until`
        self.members: list[asyncio.Task] = []

    async def __aenter__(self) -> "ElasticSearcher":
        """Start the engines of this machine, and request the others, unless they are to yield."""
        if not self.yielding:
            self._request()
        await super().__aenter__()
        return self

    async def __aexit__(self, *_) -> None:
        """End the engines, at once, and leave the cluster."""
        for member in self.members:
            member.cancel()
        await asyncio.gather(*self.members, return_exceptions=True)
        await super().__aexit__()
        ray.shutdown()

    async def load_weights(self) -> None:
        """Let the engines load the staged weights. Those on the cluster are not waited for."""
        if not self.members:
            self._request()
        await asyncio.gather(self._publish(), super().load_weights())

    async def check_agreement(self, probe: np.ndarray, expected: np.ndarray, strict: bool) -> dict[str, float]:
        """As of `Searcher`; an engine on the cluster is compared when it has loaded these weights.

        The first time it waits until as many as there must be have joined.
        """
        self.probes[self.weights.version] = np.asarray(probe).tolist(), expected
        if len(self.probes) > PROBES:
            del self.probes[next(iter(self.probes))]
        self.strict = strict
        self._notify()
        figures = await super().check_agreement(probe, expected, strict)
        if not self.began:
            log.info("waiting for %d engines; %s", sum(least for _, least, _ in self.groups), has())
        await self._until(lambda: self.began or self.failure)
        if self.failure:
            raise self.failure
        return figures

    def _request(self) -> None:
        for group, (settings, _, most) in enumerate(self.groups):
            for _ in range(most):
                seed = settings.seed + len(self.members)
                own = replace(settings, model=found_there(settings.model), seed=seed)
                self.members.append(asyncio.create_task(self._member(group, own)))

    async def _publish(self) -> None:
        flat = self.weights.flat
        array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()  # numpy has no bf16
        self.published = self.weights.version, await asyncio.to_thread(ray.put, array)
        self._notify()

    async def _member(self, group: int, settings: EngineSettings) -> None:
        """Have an engine on the cluster, and another whenever it has ended."""
        pause, longest = RETRY_SECONDS
        while True:
            engine = RemoteEngine(settings, group)
            try:
                await engine.start()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(engine.ended())
                    tasks.create_task(self._feed(engine))
            except* Exception as errors:
                self._left(engine, errors.exceptions[0])
                pause = RETRY_SECONDS[0] if engine.agreed else min(2 * pause, longest)
            finally:
                engine.end()
            await asyncio.sleep(pause)

    async def _feed(self, engine: RemoteEngine) -> None:
        """Let an engine load the newest weights, compare it with the trainer, and so on; it joins when they agree."""
        while True:
            await self._until(lambda: self.published[0] > engine.version)
            version, flat = self.published
            async with asyncio.timeout(CALL_SECONDS):
                await engine.load_weights(version, self.weights.handle, flat)
            del flat  # freed when newer weights are published and no engine loads it
            self._notify()
            await self._until(lambda: engine.version in self.probes or self.published[0] > engine.version)
            if version in self.probes:
                tokens, expected = self.probes[version]
                async with asyncio.timeout(CALL_SECONDS):
                    self._compare(engine, await engine.call("prompt_logprobs", tokens), expected, self.strict)
            if engine.agreed and engine not in self.remote:
                self._joined(engine)
                self._notify()

    def _joined(self, engine: RemoteEngine) -> None:
        self.remote.append(engine)
        there = Counter(each.group for each in self.remote)
        self.began = self.began or all(there[i] >= least for i, (_, least, _) in enumerate(self.groups))
        log.info("an engine joined from %s: %d engines", engine.node, self.gauges()["engines"])

    def _left(self, engine: RemoteEngine, why: Exception) -> None:
        engine.dead, reason = True, str(why) or type(why).__name__
        if engine in self.remote:
            self.remote.remove(engine)
            log.info("an engine left from %s (%s): %d engines", engine.node, reason, self.gauges()["engines"])
        else:
            log.info("an engine on %s could not join (%s): another is requested", engine.node, reason)
        # What goes wrong ends the run only before it begins, or by --check-sync.
        if isinstance(why, RuntimeError) and (not self.began or (self.strict and isinstance(why, RunError))):
            self.failure = RunError(reason)
        self._notify()

    async def _least_busy(self, version: int) -> Any:
        def there() -> list:
            remote = [each for each in self.remote if not each.dead]
            return self.engines + [each for each in remote if each.version >= version]

        await self._until(there)
        return min(there(), key=lambda each: (each.dead, each.in_flight))

    async def _replacement(self, dead: Any) -> Any:
        return None if isinstance(dead, RemoteEngine) else await super()._replacement(dead)

    async def _until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await self.changed.wait()

    def _notify(self) -> None:
        self.changed.set()
        self.changed.clear()
