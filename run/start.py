"""How the trainer and the searcher of a run are made, on the devices that its settings name."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from config import Config, RunError
from run.check import register_own
from run.devices import on_cluster
from run.setup import Setup
from search.searcher import Searcher

if TYPE_CHECKING:
    from train.trainer import Trainer


@contextlib.contextmanager
def trainer(setup: Setup) -> Iterator[Callable[[], "Trainer"]]:
    """What loads the trainer, in whichever thread, with the other ranks beside it where several devices train."""
    plain = Config(**{name.name: getattr(setup.config, name.name) for name in dataclasses.fields(Config)})
    model = dict(model=setup.model, config=plain, end_token=setup.tokenizer.eos_token_id, checkpoint=setup.resume)
    if len(setup.train_devices) == 1:
        from train.trainer import Trainer

        yield functools.partial(_load, setup, functools.partial(Trainer, device=setup.train_devices[0], **model))
        return
    from run.ranks import Ranks
    from train.sharded import ShardedTrainer

    make, own = functools.partial(ShardedTrainer, **model), functools.partial(register_own, plain)
    with Ranks(make, setup.train_devices, own, setup.train_cores, setup.out / "engine.log") as ranks:
        yield functools.partial(_load, setup, ranks.trainer)


def _load(setup: Setup, make: Callable[[], "Trainer"]) -> "Trainer":
    """The trainer. A RunError where memory runs out."""
    from train.optimizer import out_of_memory

    try:
        return make()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"out of memory on {', '.join(setup.train_devices)} while loading policy and reference: choose a smaller "
            "--model, other or more --train-devices, or lower --gpu-memory-utilization where an engine shares one"
        ) from None


def searcher(setup: Setup, weights: Any) -> Searcher:
    """The searcher, whose engines take their weights from a staging tensor."""
    if not setup.remote:
        return Searcher(setup.engines, weights, **setup.sampling)
    from search.remote import ElasticSearcher

    yielding = any(map(on_cluster, setup.judge_devices))  # else engines would take all that the cluster has
    return ElasticSearcher(setup.engines, [*setup.remote.values()], yielding, weights, **setup.sampling)
