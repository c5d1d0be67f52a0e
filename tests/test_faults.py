"""What goes wrong in a run, done for real: it goes on, or ends in order, and what was paid for is there.

All with the embedded model and real vLLM. `tests/test_scoring.py` has rewards that fail, `tests/test_checkpoint.py`
checkpoints that are damaged, `tests/test_config.py` settings that cannot be.
"""

import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import screen
import tasks
import tba
import trainer
from buffer import Buffer, Group, Trajectory
from checkpoint import Checkpoints, by_step, newest
from config import Config
from log import Log
from loss import OBJECTIVES
from screen import Screen, say
from searcher import Searcher
from tests.runs import nothing_is_left, read, started, updates_of, wait_for
from watch import Watch

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


def test_killed_at_any_moment_it_goes_on(embedded, tmp_path):
    """While it starts, and twice while it trains; once its newest checkpoint is truncated too. The same command is
    given again each time, and stopped at last by SIGTERM."""
    out, chance = tmp_path / "run", random.Random()
    command = ("--model", embedded[1], "--out", out, *SHORT, "--save-every", 3, "--keep", 3, "--resume", "auto")
    steps = 0
    for kill in range(4):
        with nothing_is_left(), started(*command) as run:
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


def test_a_second_ctrl_c_ends_it_at_once(embedded, tmp_path, nothing_left):
    out, task = tmp_path / "run", tmp_path / "slow.py"
    task.write_text(
        "import time; from tasks import countdown\nclass Task(countdown.Task):\n    def end(self): time.sleep(60)\n"
    )
    with started("--task", task, "--model", embedded[1], "--out", out, *SHORT) as run:
        wait_for(lambda: "starting vLLM" in run.said(), run)
        time.sleep(2)
        os.kill(run.process.pid, signal.SIGINT)
        os.kill(run.process.pid, signal.SIGINT)  # the same once more, as some send it
        wait_for(lambda: "stopping: " in run.said(), run)
        time.sleep(0.35)
        os.kill(run.process.pid, signal.SIGINT)
        began = time.monotonic()
        run.process.join(10)
        assert run.process.exitcode == 130 and time.monotonic() - began < 2, run.said()


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
    task_reward, tb, asked = tasks.load("countdown").reward, OBJECTIVES["tb"], []

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

    def objective(batch, beta):
        count, size = next(updates), len(batch.rewards_BK)
        asked.append(size)
        if count == 5:
            return tb(batch, beta) * math.nan
        if count == 8:
            batch.logprobs_BKT.register_hook(lambda gradient: gradient * math.nan)
        if count > 11 and size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if count == 60:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited))
        if count == 150:
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        return tb(batch, beta)

    class Late(trainer.Figures):
        ready = False  # until somebody waits

        def wait(self):
            super().wait()
            self.ready = True

    def save(self, state, *parts):
        saved.append((state["step"], rows(out)))
        return checkpoints_save(self, state, *parts)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    checkpoints_save, saved = Checkpoints.save, []
    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(trainer, "Figures", Late)
    monkeypatch.setattr(tasks.load("countdown"), "reward", reward)
    monkeypatch.setitem(OBJECTIVES, "tb", objective)
    killer = when(
        lambda: rows(out) > 70,
        lambda: multiprocessing.active_children()[0].terminate(),  # is not the engine's to hear, though sent to all
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

    assert done.out.count("out of memory in an update: it is made again with --micro-batch-tokens") in (1, 2, 3, 4)
    assert asked[11] == 16 and max(asked[20:]) <= 8

    assert done.out.count("cannot be written ([Errno 27] File too large): its rows are kept, and tried again") == 1
    assert any(f"step-{step} cannot be written" in done.out for step in (30, 40, 50))

    assert "the engine on cpu is gone (it died): starting another" in done.out
    assert "the new engine on cpu is ready" in done.out
    assert re.search(r"no response has arrived for \d s: .*an engine that died is being replaced", done.out)
    assert found[-1]["engine_restarts"] == 1 and found[-1]["sync_diff_max"] < 1e-4

    folder, state = newest(out)
    assert state["step"] == steps[-1] and folder.name == f"step-{steps[-1]}" and (out / "model").is_dir()
    assert f"go on with: python tba.py --resume {out}" in done.out


def test_a_gradient_that_stays_nan_ends_with_the_last_good_checkpoint(
    embedded, tmp_path, nothing_left, main, monkeypatch
):
    tb, updates = OBJECTIVES["tb"], itertools.count(1)
    monkeypatch.setitem(OBJECTIVES, "tb", lambda *batch: tb(*batch) * (math.nan if next(updates) > 8 else 1))
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
    undone = (other / "undone" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, undone)] == [5, 6, 6, 7, 8, 9, 10, 11, 12, 12]


def test_a_screen_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capfd):
    """Its output goes to a file on a disk that is full; first that of errors alone."""
    group = Group(0, np.array([1]), [Trajectory(np.array([1], np.int32), True, 0.5, 0)])
    figures = {"reward": 0.5, "search_tokens_per_s": 1.0, "train_tokens_per_s": 1.0}
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", closefd=False)
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, Screen(full))
        monkeypatch.setattr(screen, "PLAIN_SECONDS", 0)
        log = Log(tmp_path, Config(steps=3))
        log.start_clock()
        for step in range(3):
            log.update(step, figures, [group], "prompt", lambda responses: ["text"] * len(responses))
            say(f"said {step}")
        log.close()
        if name == "stderr":
            lines = capfd.readouterr().out.splitlines()
            assert lines[1::2] == ["said 0", "said 1", "said 2"] and lines[0].startswith("1/3 [00:00<00:00] reward 0.5")
    with pytest.raises(OSError):
        full.flush()  # or nothing is shown
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_search_waits_where_it_is_far_ahead(embedded, few_problems):
    """Of 256 responses in an update, 2 times as many may be found for each, and 64 to begin with."""
    config = tba.parse(["--model", str(embedded[1]), "--search-ahead", "2", "--prime", "300"])
    run = tba.Run(config)
    run.searcher, run.log = Searcher(["cpu"], 1.0, 1), SimpleNamespace(under_way=Counter(search=1))

    async def check() -> None:
        run.searched = 10**6
        await asyncio.wait_for(run.room(), 1)  # training waits for more prompts than these responses are to
        run.primed.set()
        run.searched = 300 + 2 * 256 - 1
        await asyncio.wait_for(run.room(), 1)
        next(run.order)  # what is in flight counts
        waiting = asyncio.create_task(run.room())
        await asyncio.sleep(0.01)
        assert not waiting.done() and run.held
        assert "search waits for training (--search-ahead)" in run.awaited()
        run.step += 1
        run.go_on()
        await asyncio.wait_for(waiting, 1)
        assert not run.held
        run.unjudged = 16  # prompts, to which there are as many responses as an engine has in flight
        waiting = asyncio.create_task(run.room())
        await asyncio.sleep(0.01)
        assert not waiting.done() and not run.held
        run.unjudged -= 1
        run.go_on()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(check())


def test_it_is_said_what_is_awaited_at_growing_intervals(capfd):
    async def check() -> None:
        watch = Watch(0.2, lambda: "5 sequences \x1b[31m are in flight", "response", "update")
        watching = asyncio.create_task(watch.run())
        for _ in range(30):
            await asyncio.sleep(0.05)
            watch.saw("update")
        watching.cancel()

    asyncio.run(check())
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3  # after 0.2, 0.4 and 0.8 seconds, not 1.6
    assert lines[0] == "no response for 0 s: 5 sequences \\x1b[31m are in flight"


def test_a_resumed_run_keeps_the_best_checkpoint(embedded, tmp_path, few_problems):
    out = tmp_path / "run"
    run = tba.Run(replace(tba.parse(["--model", str(embedded[1]), "--keep", "0"]), out=str(out)))
    run.open()
    for run.step, accuracy in ((2, 0.9), (4, 0.5), (6, None)):
        run.checkpoints.save(run.state(), run.buffer.snapshot())
        run.log.write("metrics", {"step": run.step, "eval/pass@1": accuracy})
    run.end()
    resumed = tba.Run(tba.parse(["--resume", str(out), "--keep", "1"]))
    assert resumed.step == 6
    resumed.open()
    resumed.step = 8
    resumed.checkpoints.save(resumed.state(), resumed.buffer.snapshot())
    resumed.end()
    assert set(by_step(out)) == {2, 8} and os.readlink(out / "checkpoints" / "best") == "step-2"


def test_what_cannot_be_resumed_is_refused_at_once(embedded, tmp_path, main, monkeypatch):
    out = tmp_path / "run"
    state = {
        "time": 1.0,
        "searched": 0,
        "reward": 0.0,
        "skipped": 0,
        "reward_failures": 0,
        "order": {"left": [], "rng": random.Random(0).getstate()},
    }
    config = replace(tba.parse(["--model", str(embedded[1])]), out=str(out))
    run = tba.Run(config)
    run.open()
    again = ["--resume", "auto", "--out", out, "--model", embedded[1]]
    taken = f"another run (process {os.getpid()}) is writing there"
    refused = [
        (["--resume", out, "--lr", 1e-3], "lr was 0.0001 in "),
        (["--resume", out, "--strict"], "strict was False in "),
        ([*again, "--loss", "grpo"], "loss was 'tb' in "),
        (again, taken),
        (["--resume", out], taken),
        (["--out", out], "out is "),
    ]
    for arguments, complaint in refused:
        done = main(*arguments)
        assert done.code == 2 and complaint in done.err and done.err.count("\n") == 1, done.err
    run.step = 5
    buffer = Buffer()
    tokens = run.prompts[3].tokens
    buffer.add(Group(4, tokens, [Trajectory(tokens, True, 0.0, 0)]))
    run.checkpoints.save(state | {"step": 5}, buffer.snapshot())
    run.end()
    done = main("--resume", out)
    assert done.code == 2 and "its problems are not those that" in done.err
    done = main("--resume", out, "--steps", 5)
    assert done.code == 2 and "steps is 5: it must be above 5" in done.err
    done = main(*again, "--steps", 5)
    assert done.code == 0 and f"{out} is done: it has made 5 updates" in done.out
    shutil.rmtree(out / "checkpoints")
    done = main("--resume", out)
    assert done.code == 2 and "no checkpoint that is whole" in done.err
