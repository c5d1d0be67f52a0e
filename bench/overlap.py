"""Do search and training get in each other's way, and what is gained by doing both at once? Countdown.

    python -m bench.overlap                     5 repeats of 60 updates: about 3 minutes on 2 cores
    python -m bench.overlap --task gsm8k --model DIR    another task or model: all settings of tba.py
    python -m bench.overlap --json              prints, last, all figures as one JSON object

Each repeat does the same work three times. Together: so many updates while search goes on; what search stores meanwhile
is its share of the work. Alone: first as many responses are searched, then the same batches are trained on, each with
its own cores and while the other does nothing. Alternately: the same, but with every core (or the whole GPU) for
either; no time is counted for filling and draining the engine, which taking turns costs as well.

overlap_efficiency  max(search alone, training alone) / together: 1 where neither slows the other
speedup             (search + training, alternately) / together
"""

import asyncio
import contextlib

from bench.session import Batches, search, searching, session, train
from bench.table import at_least, parser, table
from tba import TBA


async def repeat(run: TBA, other: TBA, updates: int) -> dict[str, float]:
    """Seconds of each.

    Args:
        run: with the machine divided as in any run.
        other: the same with every core.
    """
    batches = Batches()
    async with searching(run):
        await train(run, 2)
        before = run.progress.responses
        with batches.recorded(run):
            together = await train(run, updates)
        responses = run.progress.responses - before
    figures = {"responses": responses, "together": together}
    for name, each in ("alone", run), ("alternately", other):
        async with searching(each):
            figures[f"search {name}"] = await search(each, responses)
        with batches.again(each):
            figures[f"train {name}"] = await train(each, updates)
    alone = max(figures["search alone"], figures["train alone"])
    alternately = figures["search alternately"] + figures["train alternately"]
    return figures | {"overlap_efficiency": alone / together, "speedup": alternately / together}


async def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--updates", type=at_least(1), default=60, help="in each repeat")
    wanted, settings = commands.parse_known_args(arguments)
    async with contextlib.AsyncExitStack() as runs:
        run = await runs.enter_async_context(session(*settings))
        shared = run.setup.train_devices != ["cpu"]  # a GPU is not divided by cores
        other = run if shared else await runs.enter_async_context(session(*settings, every_core=True))
        repeats = [await repeat(run, other, wanted.updates) for _ in range(wanted.repeats)]
    table(repeats, wanted.json)


if __name__ == "__main__":
    asyncio.run(main())
