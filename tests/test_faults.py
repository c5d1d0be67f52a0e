"""What goes wrong in a run, done for real: it goes on, or ends in order, and what was paid for is there.

All with the embedded model and real vLLM. `tests/test_guard.py` has rewards that fail, `tests/test_checkpoint.py`
checkpoints that are damaged, `tests/test_config.py` settings that cannot be.
"""

import asyncio
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import loss
import tasks
from buffer import Group, Response
from loss import OBJECTIVES
from run.checkpoint import Checkpoints, by_step, newest
from run.cli import parse
from run.setup import Setup, prepare
from run.snapshot import buffer_writer
from run.state import state_dict, status
from search.searcher import Searcher
from tba import TBA
from tests.runs import nothing_is_left, read, started, updates_of, wait_for
from train import trainer

SHORT = ("--steps", 100_000, "--prime", 64, "--eval-prompts", 0, "--save-every", 10)


def rows(out) -> int:
    """How many updates its metrics have."""
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").is_file() else 0


def whole(out) -> list[int]:
    """The steps of its updates, which are those from 1 on with none missing or repeated, in its metrics and samples."""
    updates = updates_of(out)
    steps = [row["step"] for row in updates]
    assert steps == list(range(1, len(steps) + 1)) == [row["step"] for row in read(out / "samples.jsonl")]
    assert all(a["time"] < b["time"] for a, b in itertools.pairwise(updates))
    return steps


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on(embedded, tmp_path):
    """While it starts, and twice while it trains; once its newest checkpoint is truncated too. The same command is
    given again each time, and stopped at last by SIGTERM."""
    out, chance = tmp_path / "run", random.Random()
    command = ("--model", embedded[1], "--out", out, *SHORT, "--save-every", 3, "--keep", 3, "--resume", "auto")
    steps = 0
    for kill in range(4):
        ranks = ["cpu"] * (1 + kill % 2)  # in turn: a checkpoint is of any number of ranks
        with nothing_is_left(), started(*command, "--train-devices", *ranks) as run:
            if kill == 0:
                time.sleep(chance.uniform(0.1, 5))
            else:
                target = rows(out) + chance.randrange(4, 40)
                wait_for(lambda target=target: rows(out) > target, run)
                time.sleep(chance.uniform(0, 0.1))
            run.process.kill() if kill < 3 else run.process.terminate()
            run.process.join(30)
            assert run.process.exitcode == (-signal.SIGKILL if kill < 3 else 143), run.said()
            assert "Traceback" not in run.said()
            damaged = kill == 3  # the one before found its checkpoint truncated
            assert (f"step-{steps} is damaged" in run.said()) == damaged, run.said()
            said = run.said()
        saved = newest(out)
        assert kill == 0 or saved
        assert not saved or saved[1]["step"] >= steps - 10 * damaged
        steps = saved[1]["step"] if saved else 0
        if kill == 2:
            weights = by_step(out)[steps] / "model.safetensors"
            os.truncate(weights, weights.stat().st_size - 1)
    assert whole(out)[-1] == steps == newest(out)[1]["step"]  # nothing is lost when it is stopped in order
    assert "stopping: the update under way ends" in said and f"stopped at step {steps}" in said
    assert not [path for path in out.rglob("*.tmp")]
    assert len(by_step(out)) == 3


@pytest.mark.long
def test_a_second_ctrl_c_ends_it_at_once(embedded, tmp_path, nothing_left):
    out, task = tmp_path / "run", tmp_path / "slow.py"
    task.write_text(
        "import contextlib, time\nfrom tasks import countdown\nclass Task(countdown.Task):\n"
        "    @contextlib.asynccontextmanager\n    async def serving(self, setup):\n"
        "        try:\n            yield\n        finally:\n            time.sleep(60)\n"
    )
    with started("--task", task, "--model", embedded[1], "--out", out, *SHORT) as run:
        wait_for(lambda: rows(out) > 1, run)
        os.kill(run.process.pid, signal.SIGINT)
        os.kill(run.process.pid, signal.SIGINT)  # the same once more, as some send it
        wait_for(lambda: "stopping: " in run.said(), run)
        time.sleep(0.35)
        os.kill(run.process.pid, signal.SIGINT)
        began = time.monotonic()
        run.process.join(10)
        assert run.process.exitcode == -signal.SIGINT and time.monotonic() - began < 2, run.said()


def when(condition, *actions) -> threading.Thread:
    """Do something as soon as it holds, then the next as soon as the next holds: condition, action, condition, ..."""

    def work():
        try:
            for holds, action in zip((condition, *actions[1::2]), actions[::2], strict=True):
                wait_for(holds, seconds=180)
                action()
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)  # else the run would have no end
            raise

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_run_survives_what_goes_wrong(embedded, tmp_path, nothing_left, main, monkeypatch):
    """Rewards that raise, hang, are nan, infinite or too few; a loss and a gradient that are nan; no memory; no disk;
    an engine that is killed, and Ctrl-C at the end. All of it with figures that come late, as from a GPU."""
    out, calls, updates = tmp_path / "run", itertools.count(1), itertools.count(1)
    task_reward, tb_tapered, asked = tasks.load("countdown").reward, OBJECTIVES["tb_tapered"], []

    def reward(task, problem, responses):
        right = task_reward(task, problem, responses)
        match next(calls):
            case 3:
                raise RuntimeError("the reward broke")
            case 6:
                time.sleep(1.5)
            case 9:
                return [math.nan, math.inf, *right[2:]]
            case 12:
                return right[:-1]
        return right

    @loss.objective(needs_beta=True, has_gamma=True, reads_behaviour=True)
    def objective(batch, beta):
        count, size = next(updates), len(batch.rewards_BK)
        asked.append(size)
        if count == 5:
            return tb_tapered(batch, beta) * math.nan
        if count == 8:
            batch.logprobs_BKT.register_hook(lambda gradient: gradient * math.nan)
        if count > 11 and size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if count == 60:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited))
        if count == 150:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        return tb_tapered(batch, beta)

    class Late(trainer.Pending):
        ready = False  # until the next update is enqueued, as on a GPU

    def save(self, state, *parts):
        saved.append((state["step"], rows(out)))
        return checkpoints_save(self, state, *parts)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    checkpoints_save, saved = Checkpoints.save, []
    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(trainer, "Pending", Late)
    monkeypatch.setattr(tasks.load("countdown"), "reward", reward)
    monkeypatch.setitem(OBJECTIVES, "tb_tapered", objective)
    killer = when(
        lambda: rows(out) > 70,
        lambda: multiprocessing.active_children()[0].terminate(),  # ignored by engines, though sent to all
        lambda: rows(out) > 80,
        lambda: multiprocessing.active_children()[0].kill(),
        lambda: updates_of(out)[-1]["engine_restarts"] == 1 and updates_of(out)[-1]["age_max"] < 20,
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    arguments = ("--model", embedded[1], "--out", out, *SHORT, "--reward-timeout", 1, "--stall-seconds", 0.5)
    done = main(*arguments, "--micro-batch-tokens", 4096, "--search-ahead", 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert done.code == 130, done.err
    assert not killer.is_alive() and "Traceback" not in done.out + done.err
    steps, found = whole(out), updates_of(out)

    assert saved[0] == (10, 10)  # a checkpoint's updates are in the metrics, or a kill after it would lose them
    assert found[-1]["reward_failures"] == 16 + 16 + 2 + 16
    assert all(math.isfinite(row["batch_reward"]) for row in found)

    assert [row["step"] for row in found if row["loss"] is None or row["grad_norm"] is None] == [5, 8]
    assert [row["skipped"] for row in found[:10]] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert "update 5 is skipped: its loss is nan" in done.out and "update 8 is skipped: its loss is " in done.out
    assert "=" in done.out.split("its prompts are ")[1].splitlines()[0]

    assert done.out.count("out of memory in an update: trying again with --micro-batch-tokens") in (1, 2, 3, 4)
    assert asked[11] == 16 and max(asked[20:]) <= 8

    assert done.out.count("cannot be written ([Errno 27] File too large): its rows are kept, and tried again") == 1
    assert any(f"step-{step} cannot be written" in done.out for step in (30, 40, 50))

    assert "the engine on cpu is gone (it died): starting another" in done.out
    assert "the new engine on cpu is ready" in done.out
    assert re.search(r"no response for \d s: .*an engine that died is being replaced", done.out)
    assert found[-1]["engine_restarts"] == 1 and found[-1]["sync_diff_max"] < 1e-4

    folder, state = newest(out)
    assert state["step"] == steps[-1] and folder.name == f"step-{steps[-1]}" and (out / "model").is_dir()
    assert f"go on with: python tba.py --resume {out}" in done.out


def test_a_gradient_that_stays_nan_ends_with_the_last_good_checkpoint(
    embedded, tmp_path, nothing_left, main, monkeypatch
):
    tb_tapered, updates = OBJECTIVES["tb_tapered"], itertools.count(1)

    @loss.objective(needs_beta=True, has_gamma=True, reads_behaviour=True)
    def objective(batch, beta):
        return tb_tapered(batch, beta) * (math.nan if next(updates) > 8 else 1)

    monkeypatch.setitem(OBJECTIVES, "tb_tapered", objective)
    out = tmp_path / "run"
    done = main("--model", embedded[1], "--out", out, *SHORT, "--save-every", 4)
    assert done.code == 1 and "Traceback" not in done.err
    assert "10 updates in a row had no finite loss or gradient" in done.err and f"{out}/checkpoints/step-16" in done.err
    # What was skipped changed nothing: the checkpoints of updates 8 and 16 hold the same.
    weights = [by_step(out)[step] / "model.safetensors" for step in by_step(out)]
    assert [path.parent.name for path in weights] == ["step-16", "step-12"]
    assert weights[0].read_bytes() == weights[1].read_bytes() == (out / "model" / "model.safetensors").read_bytes()
    assert whole(out)[-1] == 18


def test_strict_takes_turns_and_a_resumed_run_equals_an_unbroken_one(
    embedded, tmp_path, nothing_left, main, monkeypatch
):
    """Every batch is on-policy. With an objective that asks vLLM for log-probabilities, a reference that is reset,
    near duplicates, and a reward easy to get."""
    out, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setattr("tasks.countdown.reward", lambda text, answer: text.count("1"))
    done = main(
        "--model", embedded[1], "--out", out, "--steps", 12, "--strict", "--loss", "grpo", "--reference-reset", 5,
        "--eval-prompts", 8, "--eval-every", 6, "--check-sync", "--lr", 1e-3, "--save-every", 4, "--keep", 0,
        "--near-duplicates", "edit",
    )  # fmt: skip
    assert done.code == 0, done.err
    unbroken, updates = read(out / "metrics.jsonl"), updates_of(out)
    assert [row["step"] for row in updates] == list(range(1, 13))
    assert all(row["age_mean"] == row["age_max"] == 0 for row in updates)
    assert [row["step"] for row in unbroken if "eval/pass@1" in row] == [0, 6, 12]
    spans = read(out / "timeline.jsonl")
    work = [sorted((s["start"], s["end"]) for s in spans if s["what"] == what) for what in ("search", "train", "sync")]
    assert [len(each) for each in work] == [12 * 16, 12, 12]
    for i, (begin, end) in enumerate(work[1]):
        turn = work[0][16 * i : 16 * (i + 1)]
        assert max(e for _, e in turn) <= begin and end <= work[2][i][0]
        assert i == 0 or work[2][i - 1][1] <= min(s for s, _ in turn)
    kl = [abs(row["kl"]) for row in updates]
    assert max(kl[0], kl[5], kl[10]) < 1e-5 < 1e-3 < min(kl[4], kl[9])  # the reference is the policy, and is not
    # On-policy the ratios are 1 and the advantages add up to 0: what is left of GRPO's loss is its penalty.
    assert all(abs(updates[i]["loss"]) < 1e-4 for i in (0, 5, 10))
    # No two are the same. (Of their losses two may be just 0.)
    assert updates[-1]["lr"] == 0 and len({row["grad_norm"] for row in updates}) == 12

    assert set(by_step(out)) == {4, 6, 8, 12}
    shutil.copytree(out, other)
    for step in (6, 8, 12):  # it had been killed before
        shutil.rmtree(other / "checkpoints" / f"step-{step}")
    done = main("--resume", other)
    assert done.code == 0, done.err
    resumed = read(other / "metrics.jsonl")
    assert [row["step"] for row in unbroken] == [row["step"] for row in resumed]
    names = "loss", "grad_norm", "kl", "reward", "entropy", "batch_reward", "eval/greedy"
    for a, b in zip(unbroken, resumed, strict=True):
        # Six digits are written, the last of which may be rounded otherwise: above 1 it is the fifth behind the point.
        for name in names:
            last = 1.1e-5 if name in ("grad_norm", "entropy") else 1.1e-6
            assert a.get(name) == pytest.approx(b.get(name), abs=last), name
    texts = [[row["responses"] for row in read(folder / "samples.jsonl")] for folder in (out, other)]
    assert texts[0] == texts[1]


@pytest.fixture
def idle(embedded, few_problems, tmp_path):
    """Makes a run whose parts are there, but for trainer and engines: (settings) -> TBA. Call it in an event loop."""

    def make(*settings) -> TBA:
        setup = prepare(replace(parse(["--model", str(embedded[1]), *settings]), out=str(tmp_path / "run")))
        setup.open()
        return TBA(setup, None, None, Searcher(setup.engines))

    return make


def test_search_pauses_where_it_is_far_ahead(idle):
    """Of 256 responses in an update, 2 times as many may be requested for each, and 300 to begin with."""

    async def check() -> None:
        tba = idle("--search-ahead", "2", "--prime", "300")
        tba.metrics.under_way["search"] = 1
        tba.progress.responses = 10**6
        assert not tba.too_far_ahead()  # training waits for more prompts than these responses are to
        for prompt_id in range(16):
            tba.buffer.add(Group(prompt_id, np.array([1]), [Response(np.array([prompt_id], np.int32), True)]))
        tba.progress.responses = 300 + 2 * 256 - 1
        await asyncio.wait_for(tba.until(lambda: not tba.too_far_ahead()), 1)
        next(tba.sampler)  # responses in flight count
        waiting = asyncio.create_task(tba.until(lambda: not tba.too_far_ahead()))
        await asyncio.sleep(0.01)
        assert not waiting.done() and tba.paused
        assert "search waits for training (--search-ahead)" in status(tba)
        tba.progress.step += 1
        tba.notify()
        await asyncio.wait_for(waiting, 1)
        assert not tba.paused

    asyncio.run(check())


def test_search_has_twice_as_many_prompts_under_way_as_fill_the_engines(idle):
    """Half of them wait in the engines or are scored, so that these stay full; and no more."""

    async def check() -> None:
        tba, under_way, never = idle("--prime", "100000", "--max-num-seqs", "64"), [], asyncio.Event()

        async def rollout(prompt_id: int) -> None:
            under_way.append(prompt_id)
            await never.wait()

        tba.rollout = rollout
        searching = asyncio.create_task(tba.search())
        await asyncio.sleep(0.05)
        assert len(under_way) == 2 * 64 // 16
        searching.cancel()
        await asyncio.wait({searching})

    asyncio.run(check())


def end(setup: Setup) -> None:
    for opened in (setup.checkpoints, setup.metrics, setup.lock):
        opened.__exit__(None, None, None)


def test_a_resumed_run_keeps_the_best_checkpoint(idle, tmp_path):
    async def check() -> None:
        tba = idle("--keep", "0")
        for tba.progress.step, accuracy in ((2, 0.9), (4, 0.5), (6, math.nan)):
            tba.checkpoints.save(state_dict(tba), buffer_writer(tba.buffer))
            tba.metrics.evaluation(tba.progress.step, {"pass@1": accuracy})
        end(tba.setup)
        setup = prepare(parse(["--resume", str(out), "--keep", "1"]))
        setup.open()
        resumed = TBA(setup, None, None, tba.searcher)
        assert resumed.progress.step == setup.outcome.step == 6
        resumed.progress.step = 8
        resumed.checkpoints.save(state_dict(resumed), buffer_writer(resumed.buffer))
        end(setup)

    out = tmp_path / "run"
    asyncio.run(check())
    assert set(by_step(out)) == {2, 8} and os.readlink(out / "checkpoints" / "best") == "step-2"


def test_what_cannot_be_resumed_is_refused_at_once(idle, embedded, tmp_path, main):
    out = tmp_path / "run"

    async def begin() -> TBA:
        return idle()

    tba = asyncio.run(begin())
    again = ["--resume", "auto", "--out", out, "--model", embedded[1]]
    taken = f"another run (process {os.getpid()}) is writing there"
    refused = [
        (["--resume", out, "--lr", 1e-3], "lr was 0.0003 in "),
        (["--resume", out, "--strict"], "strict was False in "),
        ([*again, "--loss", "grpo"], "loss was 'tb_tapered' in "),
        (again, taken),
        (["--resume", out], taken),
        (["--out", out], "out is "),
    ]
    for arguments, complaint in refused:
        done = main(*arguments)
        assert done.code == 2 and complaint in done.err and done.err.count("\n") == 1, done.err
    tba.progress.step = 5
    tokens = tba.prompts[3].tokens
    tba.buffer.add(Group(4, tokens, [Response(tokens, True, reward=0.0)]))
    tba.checkpoints.save(state_dict(tba), buffer_writer(tba.buffer))
    end(tba.setup)
    done = main("--resume", out)
    assert done.code == 2 and "its problems are not those that" in done.err
    done = main("--resume", out, "--steps", 5)
    assert done.code == 2 and "steps is 5: it must be above 5" in done.err
    done = main(*again, "--steps", 5)
    assert done.code == 0 and f"{out} is done: it has made 5 updates" in done.out
    shutil.rmtree(out / "checkpoints")
    done = main("--resume", out)
    assert done.code == 2 and "no checkpoint that is whole" in done.err
