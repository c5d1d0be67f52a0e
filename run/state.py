"""The state of a run: what a checkpoint has of it, how it begins and ends, and what it is doing, in a line."""

import contextlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from buffer import Group
from config import RunError
from run.checkpoint import write_atomically
from run.snapshot import buffer_writer, save_model, trainer_writer

if TYPE_CHECKING:
    from tba import TBA

log = logging.getLogger("tba")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # updates made
    engine_step: int = 0  # updates made when the engines' weights were staged
    responses: int = 0  # that search has stored


def state_dict(tba: "TBA") -> dict:
    """The state of a run, but for the trainer's and the buffer's."""
    return asdict(tba.progress) | {
        "time": tba.metrics.seconds,
        "order": tba.sampler.state_dict(),
        "reward": tba.metrics.reward,
        "skipped": tba.metrics.skipped,
        "reward_failures": tba.rewards.failures,
        "settings": asdict(tba.config),
    }


def load_state_dict(tba: "TBA", state: dict) -> None:
    """Go on from a state; `run.setup` has loaded the buffer and the order of prompts, and the trainer loads its own."""
    tba.progress = Progress(**{name: state[name] for name in asdict(tba.progress)})
    tba.metrics.reward, tba.metrics.skipped = state["reward"], state["skipped"]
    tba.rewards.failures = state["reward_failures"]


async def save(tba: "TBA") -> None:
    """Start to write a checkpoint, from copies, so that training goes on; the one before is finished first."""
    with tba.metrics.span("save"):
        await tba.checkpoints.idle()
        policy = await tba.in_trainer(trainer_writer, tba.trainer)
    tokenizer = tba.setup.tokenizer.save_pretrained
    tba.checkpoints.save(state_dict(tba), policy, tokenizer, buffer_writer(tba.buffer))


async def save_last(tba: "TBA") -> None:
    """Save a checkpoint of the last step, and the policy; not where an update was cut off while it changed weights."""
    outcome, step = tba.setup.outcome, tba.progress.step
    outcome.step = step

    def export(folder: Path) -> None:
        save_model(tba.trainer.policy, folder, weights)
        if tba.trainer.lora:
            tba.trainer.lora.save_adapter(tba.trainer.policy, folder / "adapter", adapter)
        tba.setup.tokenizer.save_pretrained(folder)

    try:
        if step and not tba.trainer.stepping:
            with contextlib.suppress(RunError):
                await tba.record()  # what a checkpoint has, metrics.jsonl has
            if not tba.metrics.diverged:  # then the checkpoints before it are the good ones
                await save(tba)
            await tba.checkpoints.idle()  # two copies may be too much for the memory
            weights = await tba.in_trainer(tba.trainer.weights)
            adapter = await tba.in_trainer(tba.trainer.weights, "adapter") if tba.trainer.lora else {}
            write_atomically(tba.setup.out / "model", export)
        outcome.failed = tba.checkpoints.failed
    except Exception as error:
        outcome.failed = f"the policy of step {step} cannot be saved ({error})"


async def add_demonstrations(tba: "TBA") -> None:
    """Score the demonstrations of --seed-data and store them, to be replayed; a resumed run has them."""
    if tba.setup.demonstrations and not tba.setup.resume:
        for prompt_id, responses in tba.setup.demonstrations.items():
            prompt = tba.prompts[prompt_id]
            if scored := await tba.rewards(prompt.problem, responses):
                tba.buffer.add(Group(prompt_id, prompt.tokens, scored), on_policy=False)
        log.info(f"demonstrations in the buffer: {len(tba.buffer)}")


def status(tba: "TBA") -> str:
    """What a run is doing and what it waits for, in a line."""
    config, under_way, searcher = tba.config, tba.metrics.under_way, tba.searcher
    parts = [
        f"{searcher.in_flight} sequences are in flight",
        f"the rewards of {tba.rewards.waiting} prompts are pending",
        f"the buffer has {len(tba.buffer)} responses to {len(tba.buffer.prompts)} prompts",
    ]
    if not searcher.gauges()["engines"]:
        parts.append("no engine is there: search waits for one to join")
    if any(engine.replacement for engine in searcher.engines):
        parts.append("an engine that died is being replaced")
    if tba.paused:
        parts.append("search waits for training (--search-ahead)")
    names = {"train": "an update", "sync": "a sync", "save": "a checkpoint", "evaluate": "an evaluation"}
    parts += [f"{name} is under way" for span, name in names.items() if under_way[span]]
    if not tba.primed() and not config.strict and not under_way["evaluate"]:
        parts.append(
            f"training waits for {config.prime} responses to {config.prompts_per_step} prompts, and has "
            f"{tba.progress.responses} to {len(tba.buffer.prompts)}"
        )
    return ", ".join(parts)
