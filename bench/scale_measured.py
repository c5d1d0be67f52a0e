"""What does it cost that an engine is on a Ray cluster, rather than a process of this program? Countdown.

    python -m bench.scale                       1, 2 and 3 engines, 5 repeats of 5 seconds: about 6 minutes on 2 cores
    python -m bench.scale --engines 1 --task gsm8k --model DIR    another number, task or model: all settings of tba.py
    python -m bench.scale --json                prints, last, all figures as one JSON object

Two runs with the same engines on the CPU are there at a time: one has them as processes of its own, the other as actors
of a cluster of one node, which is started on the same cores of this machine. Each repeat lets the one search and sync,
then the other.

here, there         generated tokens/s of all engines together, as processes and as actors
remote              there / here
sync_here, sync_there    milliseconds from the call until all engines have loaded the staged weights, idle
"""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Iterator

from bench.search import counted
from bench.session import searching, session
from bench.table import at_least, parser, table
from run.devices import cores, cpu_affinity
from tba import TBA

SYNCS = 10  # in each repeat


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


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--engines", type=at_least(1), nargs="+", default=[1, 2, 3])
    commands.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    wanted, settings = commands.parse_known_args(arguments)
    repeats: list[dict[str, float]] = [{} for _ in range(wanted.repeats)]
    for n in wanted.engines:
        with cluster(n):
            here = session(*settings, "--search-devices", *["cpu"] * n)
            there = session(*settings, "--search-devices", f"ray:cpu:{n}")
            async with here as local, there as remote:
                for run in (local, remote):  # warm
                    await rate(run, 1)
                for figures in repeats:
                    for place, run in (("here", local), ("there", remote)):
                        figures[f"{place} {n}"] = await rate(run, wanted.seconds)
                        figures[f"sync_{place} {n}"] = await sync_ms(run)
                    figures[f"remote {n}"] = figures[f"there {n}"] / figures[f"here {n}"]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
