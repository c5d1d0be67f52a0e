"""What `bench.scale` measures on this machine, on Countdown: with --check a run beside its simulation, with --measure
what it costs that an engine is on a Ray cluster. All settings of tba.py; 10 s are measured, or --max-seconds.

--check N ...       An engine's tokens/s, its shortest step and the lengths of responses are measured in a run whose
                    search never pauses. Another run, with --search-ahead, is compared with a simulation that has
                    these and the seconds of its updates.
--measure N ...     Two runs with the same engines on the CPU are there at a time: one has them as processes of its own,
                    the other as actors of a cluster of one node, which is started on the same cores of this machine.
                    5 times the one searches and syncs, then the other.

here, there         generated tokens/s of all engines together, as processes and as actors
remote              there / here
sync_here, sync_there    milliseconds from the call until all engines have loaded the staged weights, idle
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from bench.search import counted
from bench.session import ENDLESS, searching, session, training
from bench.simulation import Costs, Run, figures_of
from bench.table import show, table
from buffer import Buffer, Group, Response
from config import Config
from run.cli import parse
from run.devices import cores, cpu_affinity
from run.setup import sequences_per_engine
from search.engine import MAX_NUM_SEQS
from tba import TBA

REPEATS, SECONDS, SYNCS = 5, 10.0, 10  # syncs in each repeat
COMPARED = "responses/s", "trained on", "age", "age, 95 %", "search paused"


async def main(wanted: argparse.Namespace, settings: Sequence[str]) -> None:
    """Measure, print the table."""
    if wanted.check:
        return await check(wanted, settings)
    repeats: list[dict[str, float]] = [{} for _ in range(REPEATS)]
    for n in wanted.measure:
        with cluster(n):
            here = session(*settings, "--search-devices", *["cpu"] * n)
            there = session(*settings, "--search-devices", f"ray:cpu:{n}")
            async with here as local, there as remote:
                seconds = local.config.max_seconds or SECONDS
                for run in (local, remote):  # warm
                    await rate(run, 1)
                for figures in repeats:
                    for place, run in (("here", local), ("there", remote)):
                        figures[f"{place} {n}"] = await rate(run, seconds)
                        figures[f"sync_{place} {n}"] = await sync_ms(run)
                    figures[f"remote {n}"] = figures[f"there {n}"] / figures[f"here {n}"]
    table(repeats, wanted.json)


@contextlib.contextmanager
def cluster(engines: int) -> Iterator[None]:
    """A cluster of one node with room for so many engines, on the cores that search; RAY_ADDRESS names it."""
    from ray.cluster_utils import Cluster

    _, search_cores = cores()
    with cpu_affinity(search_cores):
        node = Cluster(initialize_head=True, head_node_args={"num_cpus": engines, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = node.address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        node.shutdown()


async def rate(run: TBA, seconds: float) -> float:
    """Generated tokens/s while nothing but search goes on."""
    with counted(run) as tokens:
        async with searching(run):
            before, began = tokens(), time.perf_counter()
            await asyncio.sleep(seconds)
            return (tokens() - before) / (time.perf_counter() - began)


async def sync_ms(run: TBA) -> float:
    """Milliseconds until all engines have loaded the staged weights; the median of some syncs."""
    took = []
    for _ in range(SYNCS):
        run.progress.step += 1
        await run.stage()
        began = time.perf_counter()
        await run.searcher.load_weights()
        while any(engine.version < run.progress.step for engine in run.searcher.remote):
            await asyncio.sleep(0.0005)
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


async def check(wanted: argparse.Namespace, settings: Sequence[str]) -> None:
    """Compare runs with their simulations."""
    rows, found, wished = [], {}, parse(list(settings))
    for n in wanted.check:
        slots = sequences_per_engine(wished, n, MAX_NUM_SEQS["cpu"])
        given = *settings, "--search-devices", *["cpu"] * n, "--max-num-seqs", str(slots)
        costs = await engine_costs((*given, "--search-ahead", str(ENDLESS)), n, slots)
        real, config, prompts, update = await observed((*given, "--search-ahead", str(wished.search_ahead)))
        costs = replace(costs, update=update)
        simulated = Run(costs, config, n, slots, prompts=prompts).figures()
        tokens_per_s = slots / (costs.step + costs.sequence * slots)
        what = f"{n} x {tokens_per_s:,.0f} tokens/s, {1000 * update:.1f} ms"
        rows.append([what, *(f"{real[name]:,.2f}, {simulated[name]:,.2f}" for name in COMPARED)])
        found[n] = {"costs": vars(costs), "real": real, "simulated": simulated}
    show(("engines, update: run, simulation of", *COMPARED), rows, found, wanted.json)


async def engine_costs(settings: Sequence[str], engines: int, slots: int) -> Costs:
    """What engines take beside training, when search never pauses."""
    async with session(*settings) as run:
        lengths, shortest, generate = [], [], run.searcher.generate
        with counted(run) as tokens:
            async with searching(run), training(run):
                before, began = tokens(), time.perf_counter()
                await asyncio.sleep(run.config.max_seconds or SECONDS)
                passed, made = time.perf_counter() - began, tokens() - before
        async with training(run):
            for prompt in run.prompts[:100]:
                began = time.perf_counter()
                (response,) = await generate(prompt.tokens, 1)
                lengths.append(len(response.tokens))
                shortest.append((time.perf_counter() - began) / lengths[-1])
    full, few = slots * engines * passed / made, statistics.median(shortest)  # seconds of a step
    sequence = min(max(0.0, (full - few) / (slots - 1)), full / slots)
    return Costs(
        step=full - sequence * slots,
        sequence=sequence,
        update=0.0,
        stage=0.0,
        pull=0.0,
        tokens=(float(np.mean(lengths)), float(np.std(lengths))),
    )


async def observed(settings: Sequence[str]) -> tuple[dict[str, float], Config, int, float]:
    """The figures of a run, as the simulation has them; its settings, with the updates that it made; how many prompts
    there are; and the seconds of an update, syncs included."""
    async with session(*settings) as run:
        stored: list[tuple[float, Response]] = []
        trained, ages, paused = set(), [], []

        def add(group: Group) -> None:
            Buffer.add(run.buffer, group)  # which keeps one of equal responses
            stored.extend((time.perf_counter(), each) for each in run.buffer.prompts[group.prompt_id].last_group)

        def sample(*arguments) -> list[Group]:
            groups = Buffer.sample(run.buffer, *arguments)
            batch = [response for group in groups for response in group.responses]
            trained.update(batch)
            ages.append([run.progress.step - response.version for response in batch])
            paused.append(run.paused)
            return groups

        vars(run.buffer).update(add=add, sample=sample)  # in front of the class's
        async with searching(run, warm=0):
            began = time.perf_counter()
            async with training(run):
                await asyncio.sleep(run.config.max_seconds or SECONDS)
                passed, updates = time.perf_counter() - began, run.progress.step
        figures = figures_of(stored, trained, ages, began, passed) | {"search paused": float(np.mean(paused))}
        return figures, replace(run.config, steps=updates), len(run.prompts), passed / updates
