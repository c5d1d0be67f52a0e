"""Metrics for the tools that a researcher has already, each installed by those who want it."""

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from config import Config


class Tracker(Protocol):
    """Where metrics go, beside metrics.jsonl: train/<name> of an update, eval/<name> of an evaluation."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Note the figures of a step."""

    def close(self) -> None:
        """Let nothing be lost."""


class TensorBoard:
    """Event files in OUT/tensorboard/, for `tensorboard --logdir runs`.

    Args:
        out: the run's folder.
        config: its settings.
        step: updates done before; later ones that it has are forgotten, for they will be made again.
    """

    def __init__(self, out: Path, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=10)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Note the figures of a step."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Let nothing be lost."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases named like the run's folder; a resumed run goes on with it.

    Args:
        out: the run's folder.
        config: its settings.
        step: updates done before.

    Raises:
        ValueError: Weights & Biases refuses.
    """

    def __init__(self, out: Path, config: Config, step: int):
        import wandb

        named = out / "wandb" / "tba-id"
        named.parent.mkdir(exist_ok=True)
        if not named.is_file():
            named.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project="tba", name=out.name, id=named.read_text(), resume="allow", dir=out,
                config=dataclasses.asdict(config), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"wandb cannot begin: {reason} (wandb login, or WANDB_MODE=offline, helps)") from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, figures: dict[str, float], step: int) -> None:
        """Note the figures of a step."""
        self.run.log(figures | {"step": step})

    def close(self) -> None:
        """Let nothing be lost."""
        self.run.finish()


# By the flag that asks for them, which is their package too.
TRACKERS: dict[str, Callable[[Path, Config, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def wanted(out: Path, config: Config, step: int) -> list[Tracker]:
    """The trackers that the settings ask for.

    Raises:
        ValueError: one refuses.
    """
    return [tracker(out, config, step) for name, tracker in TRACKERS.items() if getattr(config, name)]
