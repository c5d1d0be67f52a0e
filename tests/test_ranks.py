"""Several devices train what one would: two ranks on the CPU, by gloo."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from buffer import Group, Response
from config import Config, RunError
from run.devices import start_fork_server
from run.ranks import Ranks
from run.snapshot import trainer_writer
from search.weights import StagedWeights
from tests.runs import read
from tests.test_trainer import update
from train.sharded import ShardedTrainer, deal
from train.trainer import Trainer

PROBE = np.arange(20, 30, dtype=np.int32)


def nothing() -> None:
    pass


def broken() -> None:
    raise ValueError("the second GPU is full")


@contextlib.contextmanager
def on_ranks(count, folder, tmp_path, checkpoint=None, **settings):
    """A trainer on one device or on several."""
    made = dict(model=str(folder), config=Config(**settings), end_token=2, checkpoint=checkpoint)
    if count == 1:
        yield Trainer(device="cpu", **made)
        return
    start_fork_server(preload=False)
    make, cores = functools.partial(ShardedTrainer, **made), frozenset(os.sched_getaffinity(0))
    with Ranks(make, ["cpu"] * count, nothing, cores, tmp_path / "log") as ranks:
        yield ranks.trainer()
    assert not multiprocessing.active_children()


def uneven_groups(vocabulary: int, seed: int) -> list[Group]:
    """Three groups of which one is as long as the others together, so that ranks have one and two micro-batches."""
    rng = np.random.default_rng(seed)

    def response(length: int) -> Response:
        per_token = {"weight": rng.random(length, dtype=np.float32)}
        return Response(rng.integers(3, vocabulary, length), True, reward=rng.random(), per_token=per_token)

    def group(i: int, length: int) -> Group:
        return Group(i, rng.integers(3, vocabulary, 5), [response(rng.integers(1, length)) for _ in range(4)])

    return [group(0, 6), group(1, 24), group(2, 6)]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_updates_are_the_same_on_two_ranks_and_go_on_from_the_checkpoint_of_either(
    make_model, tokenizer, tmp_path, lora_rank
):
    """Losses to 1e-5, weights to 1e-4; policy, reset reference and optimiser go on; so does what is staged."""
    folder = make_model("llama", True)
    settings = dict(micro_batch_tokens=40, max_grad_norm=0.5, lora_rank=lora_rank)
    groups = [uneven_groups(len(tokenizer), seed) for seed in range(4)]
    expected = {}  # of one rank, then compared with

    def updates(trainer, steps) -> None:
        for step in steps:
            if step == 1 and not lora_rank:
                trainer.reset_reference()
            for response in (r for group in groups[step] for r in group.responses):
                response.ref_logprobs = None
            figures = update(trainer, groups[step])
            figures["scores"] = sum(r.ref_logprobs.sum() for group in groups[step] for r in group.responses)
            assert figures == pytest.approx(expected.setdefault(step, figures), rel=1e-5, abs=1e-6)

    def same(trainer) -> None:
        staged = StagedWeights(trainer.layout, ["cpu"])
        logprobs = trainer.stage(staged, PROBE, 4).numpy()
        weights = {name: weight.clone() for name, weight in staged.views.items()}
        torch.testing.assert_close(weights, expected.setdefault("weights", weights), atol=1e-4, rtol=0)
        np.testing.assert_allclose(logprobs, expected.setdefault("probe", logprobs), atol=1e-4)

    for ranks in (1, 2):
        with on_ranks(ranks, folder, tmp_path, **settings) as trainer:
            updates(trainer, (0, 1))
            trainer_writer(trainer)(tmp_path / f"of-{ranks}")
            updates(trainer, (2, 3))
            same(trainer)
    sizes = [{path.name: path.stat().st_size // 1000 for path in (tmp_path / f"of-{n}").rglob("*")} for n in (1, 2)]
    assert sizes[0] == sizes[1]  # whole either way
    for before, after in ((1, 2), (2, 1)):
        with on_ranks(after, folder, tmp_path, checkpoint=tmp_path / f"of-{before}", **settings) as trainer:
            updates(trainer, (2, 3))
            same(trainer)


def test_a_rank_that_fails_before_all_have_met_is_not_waited_for(tmp_path):
    start_fork_server(preload=False)
    make = functools.partial(ShardedTrainer, model="none", config=Config(), end_token=2, checkpoint=None)
    cores = frozenset(os.sched_getaffinity(0))
    with (
        Ranks(make, ["cpu", "cpu"], broken, cores, tmp_path / "log") as ranks,
        pytest.raises(RunError, match=r"a trainer is gone: ValueError: the second GPU is full \(cpu\)"),
    ):
        ranks.trainer()


def test_groups_are_dealt_by_their_tokens():
    lengths = [5, 60, 10, 10, 10, 10]
    groups = [Group(i, np.zeros(2), [Response(np.zeros(n), True)]) for i, n in enumerate(lengths)]
    dealt = [sorted(group.prompt_id for group in some) for some in deal(groups, 2, share=True)]
    assert dealt == [[1], [0, 2, 3, 4, 5]]
    assert all(len(some) == 1 for some in deal(groups, 6, share=False))


def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(embedded, tmp_path, nothing_left, main):
    out = tmp_path / "run"
    settings = "--model", embedded[1], "--out", out, "--prime", 64, "--eval-prompts", 0, "--save-every", 2
    killed = []

    def kill() -> None:
        while not any((out / "checkpoints").glob("step-4")):
            time.sleep(0.05)
        (rank,) = [child for child in multiprocessing.active_children() if child.name == "rank 1"]
        os.kill(rank.pid, signal.SIGKILL)
        killed.append(rank.pid)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    done = main(*settings, "--train-devices", "cpu", "cpu", "--steps", 5000)
    assert killed and done.code == 1 and "Traceback" not in done.err, done.err
    assert (
        "tba: a trainer is gone: its process ended (cpu)" in done.err
        and f"go on with: python tba.py --resume {out}" in done.out
    )
    steps = [row["step"] for row in read(out / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    saved = max(int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints").glob("step-*"))
    resumed = main("--resume", out, "--train-devices", "cpu", "--steps", saved + 2)
    assert resumed.code == 0 and read(out / "metrics.jsonl")[-1]["step"] == saved + 2
