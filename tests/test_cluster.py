"""Engines on a Ray cluster, whose nodes are processes of this machine: they join, load weights, answer, and leave."""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from config import RunError
from rewards.judges import Embedder
from run.devices import on_cluster
from search import remote, weights
from search.cluster import connect
from search.engine import EngineDied
from search.searcher import Searcher
from tests.runs import nothing_is_left, started, updates_of, wait_for
from tests.test_faults import SHORT, rows, when, whole

STORE = 80 * 2**20  # bytes of a node's object store, the least that there may be
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@contextlib.contextmanager
def running(monkeypatch, nodes: int) -> Iterator[Cluster]:
    """A cluster whose head has no room, beside so many nodes of one CPU core."""
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it would count what else this machine does
    head = dict(num_cpus=0, object_store_memory=STORE, include_dashboard=False, _system_config=QUICK)
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)  # else no thread may add nodes
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        for _ in range(nodes):
            add_node(cluster)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=STORE)


@pytest.fixture
def answers(monkeypatch) -> list[tuple]:
    """(node, method, result) of the calls that engines on the cluster answered."""
    answers, call = [], remote.RemoteEngine.call

    async def noting(engine, method, *arguments):
        result = await call(engine, method, *arguments)
        answers.append((engine, method, result))
        return result

    monkeypatch.setattr(remote.RemoteEngine, "call", noting)
    return answers


def objects(address: str) -> int:
    """How many objects the cluster's stores have."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only", "--address", address]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return sum(int(count) for count in re.findall(r"(\d+) objects", said.stdout)) if said.stdout else -1


@pytest.fixture(autouse=True)
def one_cluster_at_a_time():
    """Another process's tests wait: two clusters are too much for two cores, and each would find the other's left."""
    with open(Path(tempfile.gettempdir()) / "tba-tests-cluster.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    "word", ["ray", "ray:", "ray:0", "ray:-1", "ray:4-2", "ray:cpu", "ray:gpu:1", "ray:1-", "ray:\u00b2"]
)
def test_a_word_that_names_no_engines_is_refused(word):
    with pytest.raises(ValueError, match=r"as in ray:4-64"):
        on_cluster(word)


def test_a_cluster_that_cannot_be_reached_is_said_and_what_it_may_need(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr("search.cluster.TOKEN", tmp_path / "auth_token")
    with pytest.raises(ValueError, match=r"no Ray cluster can be reached at '127\.0\.0\.1:1': (?!.*RAY_AUTH_MODE)"):
        connect()
    (tmp_path / "auth_token").touch()
    with pytest.raises(ValueError, match="auth_token exists it needs RAY_AUTH_MODE=token"):
        connect()


def test_an_engine_here_and_one_on_a_cluster_train_together(main, embedded, tmp_path, monkeypatch, answers):
    out = tmp_path / "run"

    def enough() -> bool:
        """The engine there has answered under several versions of the weights, and was compared after several syncs."""
        versions = {each.version for _, method, found in answers[:] if method == "generate" for each in found}
        return len(versions) > 3 and sum(method == "prompt_logprobs" for _, method, _ in answers[:]) > 3

    with nothing_is_left(), running(monkeypatch, nodes=1):
        killer = when(enough, lambda: os.kill(os.getpid(), signal.SIGINT))
        done = main(
            "--model", os.path.relpath(embedded[1]), "--out", out, *SHORT, "--search-devices", "cpu", "ray:cpu:1",
            "--check-sync",
        )  # fmt: skip
    assert done.code == 130 and not killer.is_alive() and enough(), done.err
    assert re.search(r"^an engine joined from node [\d.]+: 2 engines$", done.out, re.MULTILINE)
    updates = updates_of(out)
    assert {row["engines"] for row in updates} == {2}
    assert all(row["engine_tokens_per_s"] == pytest.approx(row["search_tokens_per_s"] / 2, 1e-4) for row in updates)
    assert 0 < updates[-1]["sync_diff_max"] < 1e-3


@pytest.mark.long
def test_a_model_that_scores_waits_for_room_and_can_be_stopped(make_model, monkeypatch, lines):
    judge = Embedder(str(make_model("bert", kind="")), "embedder")

    async def stopped() -> float:
        async def load() -> None:
            async with judge.loaded("ray:cpu:1", {0}):
                raise AssertionError("it was loaded where there is no room")

        loading = asyncio.create_task(load())
        while not judge.there:
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        assert not loading.done()
        loading.cancel()
        began = time.monotonic()
        await asyncio.wait({loading})
        assert loading.cancelled()
        return time.monotonic() - began

    with nothing_is_left(), running(monkeypatch, nodes=0):
        connect()
        assert asyncio.run(stopped()) < 5
    assert lines[-1] == "waiting for a place for embedder: the cluster has 0 GPUs (0 free) and 0 CPUs (0 free)"


@pytest.mark.long
def test_models_that_score_have_their_places_before_engines_take_all(main, tldr, tldr_models, tmp_path, monkeypatch):
    policy, judge = tldr_models
    out, relative = tmp_path / "run", os.path.relpath
    with nothing_is_left(), running(monkeypatch, nodes=2):
        done = main(
            "--task", "tldr", "--data", tldr, "--model", relative(policy), "--reward-model", relative(judge),
            "--out", out, "--steps", 3, "--prime", 0, "--prompts-per-step", 2, "--responses-per-prompt", 2,
            "--search-responses", 2, "--max-tokens", 8, "--beta-steps", 2, "--eval-prompts", 0,
            "--search-devices", "cpu", "ray:cpu:1-4", "--judge-devices", "ray:cpu:1",
        )  # fmt: skip
    assert done.code == 0, done.err
    assert re.search(r"^waiting for a place for reward_model: .* 2 CPUs \(2 free\)$", done.out, re.MULTILINE)
    updates = updates_of(out)
    assert {row["engines"] for row in updates} == {2} and updates[-1]["reward_failures"] == 0


@pytest.mark.long
def test_an_engine_that_does_not_agree_ends_a_run_that_has_not_begun(main, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr("search.weights.TOLERANCE", dict.fromkeys(weights.TOLERANCE, -1.0))
    with nothing_is_left(), running(monkeypatch, nodes=1):
        done = main("--model", embedded[1], "--out", tmp_path / "run", *SHORT, "--search-devices", "ray:cpu:1")
    assert done.code == 1 and "after a sync: what it samples from is not what is trained" in done.err
    why = r"^an engine on node [\d.]+ could not join \(the engine on cpu and the trainer differ by"
    assert re.search(why, done.out, re.MULTILINE)
    assert "joined" not in done.out


@pytest.mark.long
def test_a_model_that_scores_gives_there_what_it_gives_here(make_model, monkeypatch):
    judge, texts = Embedder(str(make_model("bert", kind="")), "embedder"), ["a", "two words"]

    async def scores(device: str) -> np.ndarray:
        async with judge.loaded(device, {0}):
            return np.array(await judge(texts))

    here = asyncio.run(scores("cpu"))
    judge = Embedder(os.path.relpath(judge.name), "embedder")
    with nothing_is_left(), running(monkeypatch, nodes=1):
        connect()
        there = asyncio.run(scores("ray:cpu:1"))
        (Path(judge.name) / "model.safetensors").unlink()
        judge = Embedder(judge.name, "embedder")
        with pytest.raises(RunError, match=r"cannot be loaded on the cluster: OSError: .*model\.safetensors"):
            asyncio.run(scores("ray:cpu:1"))
    assert not hasattr(judge, "model")  # it is there alone
    assert here.shape[0] == 2 and np.abs(there - here).max() < 1e-5


@pytest.mark.long
def test_an_engine_whose_call_is_lost_is_ended(monkeypatch):
    """Else it would live on without being asked anything, and nothing would be in its place."""

    class Host:
        async def wait(self) -> None:
            await asyncio.sleep(3600)

        call = wait

    async def lose() -> None:
        engine = remote.RemoteEngine(SimpleNamespace(device="cpu"), 0)
        ended = asyncio.create_task(engine.ended())
        reference = engine.actor.call.remote()
        ray.cancel(reference)
        async with asyncio.timeout(60):
            with pytest.raises(EngineDied, match="cancel"):
                await engine._answer(SimpleNamespace(remote=lambda: reference))
            with pytest.raises(EngineDied):
                await ended

    monkeypatch.setattr(remote, "EngineHost", Host)
    with nothing_is_left(), running(monkeypatch, nodes=1):
        connect()
        asyncio.run(lose())


@pytest.mark.long
def test_nodes_go_and_come_in_mid_run(main, embedded, tmp_path, monkeypatch, answers):
    """An engine here and two on a cluster; one's node is killed and another is added: the run goes on, and each prompt
    that was asked is answered."""
    out, asked, answered, generate = tmp_path / "run", [], [], Searcher.generate

    async def noting(searcher, prompt, n, **sampling):
        asked.append(n)
        responses = await generate(searcher, prompt, n, **sampling)
        answered.append(len(responses))
        return responses

    def engines() -> list[int]:
        return [row["engines"] for row in updates_of(out)] if rows(out) > 1 else []

    def busy(remote_ones: int) -> bool:
        """Three engines are there, and so many of a cluster have answered so far."""
        generated = {id(engine) for engine, method, _ in answers if method == "generate"}
        return engines()[-10:] == [3] * 10 and len(generated) == remote_ones

    monkeypatch.setattr(Searcher, "generate", noting)
    with nothing_is_left(), running(monkeypatch, nodes=2) as cluster:
        doomed = cluster.worker_nodes.copy().pop()
        killer = when(
            lambda: busy(2),
            lambda: cluster.remove_node(doomed, allow_graceful=False),
            lambda: engines()[-10:] == [2] * 10,
            lambda: add_node(cluster),
            lambda: busy(3),
            lambda: os.kill(os.getpid(), signal.SIGINT),
        )
        searching = "--search-devices", "cpu", "ray:cpu:2"
        done = main("--model", embedded[1], "--out", out, *SHORT, *searching, "--check-sync", "--stall-seconds", 30)
    assert done.code == 130 and not killer.is_alive(), done.err
    assert "Traceback" not in done.out + done.err
    assert len(whole(out)) > 30
    assert [n for n, _ in itertools.groupby(engines())] == [3, 2, 3], done.out
    assert re.search(r"^an engine left from node [\d.]+ \(it died\): 2 engines$", done.out, re.MULTILINE)
    assert max(updates_of(out)[-1][name] for name in ("engine_restarts", "reward_failures")) == 0
    in_flight = len(asked) - len(answered)  # what Ctrl-C cancelled
    assert in_flight <= 2 * 3 * 256 // 16, "responses were lost with the node"


@pytest.mark.long
def test_with_all_engines_on_a_cluster_the_run_waits_for_one(main, embedded, tmp_path, monkeypatch):
    out, log, said = tmp_path / "run", logging.getLogger("tba"), []
    info = log.info

    def joined() -> int:
        return sum("an engine joined" in message for message in said)

    monkeypatch.setattr(log, "info", lambda message, *each: (said.append(message), info(message, *each)))
    with nothing_is_left(), running(monkeypatch, nodes=1) as cluster:
        doomed = cluster.worker_nodes.copy().pop()
        killer = when(
            lambda: rows(out) > 10,
            lambda: cluster.remove_node(doomed, allow_graceful=False),
            lambda: any("no engine is there: search waits for one to join" in message for message in said),
            lambda: add_node(cluster),
            lambda: joined() == 2 and updates_of(out)[-1]["search_tokens_per_s"] > 0,
            lambda: os.kill(os.getpid(), signal.SIGINT),
        )
        done = main(
            "--model", embedded[1], "--out", out, *SHORT, "--search-devices", "ray:cpu:1-2", "--check-sync",
            "--stall-seconds", 3,
        )  # fmt: skip
    assert done.code == 130 and not killer.is_alive(), done.err
    assert joined() == 2, done.out
    assert {row["engines"] for row in updates_of(out)} == {0, 1}  # training went on without


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_on_the_cluster(embedded, tmp_path, monkeypatch, number):
    """No process, object or socket, whether the run is stopped in order or killed."""
    out = tmp_path / "run"
    with nothing_is_left(), running(monkeypatch, nodes=1) as cluster:
        sockets = Path(cluster.head_node.get_session_dir_path(), "sockets")
        before = sorted(sockets.iterdir())
        arguments = ("--model", embedded[1], "--out", out, *SHORT, "--search-devices", "cpu", "ray:cpu:1")
        with nothing_is_left(), started(*arguments, RAY_ADDRESS=cluster.address) as run:
            wait_for(lambda: rows(out) > 100, run)
            assert 0 < objects(cluster.address) <= 8, "old weights are not freed"  # of 50 syncs, on two nodes
            os.kill(run.process.pid, number)
            run.process.join(60)
            assert run.process.exitcode == (130 if number == signal.SIGINT else -number), run.said()
        assert objects(cluster.address) == 0
        assert sorted(sockets.iterdir()) == before
