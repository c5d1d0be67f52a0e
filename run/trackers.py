"""Metrics for the tools that a researcher has already, each installed by those who want it."""

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path

from config import Config

Tracker = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]  # log a step's figures; close


def tensorboard(out: Path, config: Config, step: int) -> Tracker:
    """Event files in OUT/tensorboard/. Events after `step` are purged: a resumed run makes those updates again."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=10)

    def write(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def weights_and_biases(out: Path, config: Config, step: int) -> Tracker:
    """A run of Weights & Biases with the name of the run's folder, which a resumed run continues."""
    import wandb

    id_file = out / "wandb" / "tba-id"
    id_file.parent.mkdir(exist_ok=True)
    if not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project="tba", name=out.name, id=id_file.read_text(), resume="allow", dir=out,
            config=dataclasses.asdict(config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"wandb cannot begin: {reason} (wandb login, or WANDB_MODE=offline, helps)") from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return (lambda figures, step: run.log(figures | {"step": step})), run.finish


TRACKERS = {"tensorboard": tensorboard, "wandb": weights_and_biases}  # by their flags
