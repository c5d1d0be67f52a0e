"""A folder that exists is whole, the right ones stay, and a run's folder has one run."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from buffer import Buffer, Group, Trajectory
from checkpoint import Checkpoints, lock, newest, tidy, write_folder
from data import Order
from log import Rows, set_aside
from tests.runs import PROJECT, read


def a_file(folder):
    (folder / "weights").write_bytes(b"0123456789")


def saved(out, *steps, keep=0, scores=(), spare=None, write=a_file):
    checkpoints = Checkpoints(out, keep)
    checkpoints.scores, checkpoints.spare = dict(scores), spare
    for step in steps:
        checkpoints.save({"step": step}, write)
    checkpoints.end()
    return checkpoints


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_newest_stay_and_the_best(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2, scores={1: 0.5, 2: 0.7, 3: 0.1})
    assert names(tmp_path) == ["best", "step-2", "step-3", "step-4"]
    assert (tmp_path / "checkpoints" / "best" / "weights").read_bytes() == b"0123456789"
    again = saved(tmp_path, 5, keep=2, scores={2: 0.7}, spare=3)  # 3 is being evaluated
    assert names(tmp_path) == ["best", "step-2", "step-3", "step-4", "step-5"]
    again = Checkpoints(tmp_path, 2)
    again.scores = {2: 0.7}
    again.score(5, 0.9)
    again.end()
    assert names(tmp_path) == ["best", "step-4", "step-5"]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-5"


def test_all_stay_with_keep_0(tmp_path):
    (tmp_path / "checkpoints" / "step-2-mine").mkdir(parents=True)  # is nobody's concern
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-1", "step-2", "step-2-mine", "step-3"]
    assert newest(tmp_path)[1]["step"] == 3


def test_what_cannot_be_written_leaves_nothing_and_removes_nothing(tmp_path, capfd):
    def full(folder):
        a_file(folder)
        raise OSError(28, "No space left on device")

    checkpoints = saved(tmp_path, 1, keep=1)
    checkpoints = saved(tmp_path, 2, keep=1, write=full)
    assert names(tmp_path) == ["step-1"] and "No space left" in checkpoints.failed
    assert (
        "step-2 cannot be written ([Errno 28] No space left on device): those before it stay" in capfd.readouterr().out
    )
    checkpoints = saved(tmp_path, 2, 3, keep=1)
    assert names(tmp_path) == ["step-3"] and not checkpoints.failed


def test_a_folder_is_seen_only_when_whole(tmp_path):
    def look(folder):
        a_file(folder)
        assert not (tmp_path / "model").exists()

    write_folder(tmp_path / "model", look)
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "model", lambda folder: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # as it was
    write_folder(tmp_path / "model", lambda folder: (folder / "new").write_text("2"))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "no state"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(tmp_path, capfd, damage):
    saved(tmp_path, 1, 2, 10)
    folder = tmp_path / "checkpoints" / "step-10"
    if damage == "truncated":
        (folder / "weights").write_bytes(b"012345678")
    elif damage == "missing":
        (folder / "weights").unlink()
    elif damage == "state":
        (folder / "state.json").write_text('{"step": 10, "fil')
    else:
        (folder / "state.json").unlink()
    found, state = newest(tmp_path)
    assert found.name == "step-2" and state["step"] == 2
    assert "step-10 is damaged" in capfd.readouterr().out
    (tmp_path / "checkpoints" / "step-11.tmp").mkdir()
    tidy(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-10.damaged", "step-2"]
    assert newest(tmp_path)[0] == found and not capfd.readouterr().out


def test_there_may_be_none(tmp_path):
    assert newest(tmp_path) is None


def test_a_folder_has_one_run(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(ValueError, match=f"another run \\(process {os.getpid()}\\) is writing there"):
        lock(tmp_path)
    held.close()
    program = (
        "import sys, pathlib, checkpoint; a = checkpoint.lock(pathlib.Path(sys.argv[1])); print(1, flush=1); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=PROJECT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"process {other.pid}"):
            lock(tmp_path)
        other.kill()
    lock(tmp_path).close()  # however the other ended


# ---- the buffer ----


def response(rng, reward, logprobs=True):
    tokens = rng.integers(0, 9, rng.integers(1, 6)).astype(np.int32)
    figures = rng.random(len(tokens)).astype(np.float32)
    version, finished, embedding = int(rng.integers(9)), bool(rng.random() < 0.5), np.ones(2, np.float32)
    return Trajectory(tokens, finished, reward, version, figures if logprobs else None, embedding=embedding)


def filled(**settings):
    rng, buffer = np.random.default_rng(0), Buffer(capacity=5, **settings)
    for i in range(60):
        prompt_id = int(rng.integers(9))
        responses = [response(rng, float(rng.normal()), logprobs=i % 2) for _ in range(4)]
        buffer.add(Group(prompt_id, np.arange(1 + prompt_id, dtype=np.int32), [*responses, responses[0]]))
        if i == 40:
            buffer.start_window()
    for group in buffer.sample(4, 4, 0.5):
        for each in group.responses:
            each.ref_logprobs, each.ref_version = np.full(len(each.tokens), -0.5, np.float32), 3
    return buffer


FIELDS = [field.name for field in dataclasses.fields(Trajectory)]


def described(batches):
    def plain(value):
        return value.tolist() if isinstance(value, np.ndarray) else value

    return [
        (g.prompt_id, g.prompt.tolist(), [[plain(getattr(r, name)) for name in FIELDS] for r in g.responses])
        for groups in batches
        for g in groups
    ]


@pytest.mark.parametrize("limit", [float("inf"), 20])
def test_a_restored_buffer_goes_on_as_the_one_that_was_saved(tmp_path, limit):
    one, other = filled(limit=limit, least=4), Buffer(capacity=5, limit=limit, least=4)
    write = one.snapshot()
    untouched = described([one.sample(4, 6, 0.5) for _ in range(9)])
    rng = np.random.default_rng(5)
    one.add(Group(77, np.array([1], np.int32), [response(rng, 0.0)]))  # goes on while it is written
    write(tmp_path)
    other.restore(tmp_path)
    assert described([other.sample(4, 6, 0.5) for _ in range(9)]) == untouched
    other.add(Group(77, np.array([1], np.int32), [response(np.random.default_rng(5), 0.0)]))
    for buffer in (one, other):  # both evict the same, from all and from one
        rng = np.random.default_rng(1)
        for prompt_id in (3, 3, 4, 100):
            buffer.add(Group(prompt_id, np.array([1], np.int32), [response(rng, 0.1 * i) for i in range(3)]))
    assert (len(one), one.nbytes, one.seen, one.repeated) == (len(other), other.nbytes, other.seen, other.repeated)
    assert (list(one.recent), one.arrived) == (list(other.recent), other.arrived)
    assert described([one.sample(4, 6, 0.5)]) == described([other.sample(4, 6, 0.5)])
    same = {id(r) for r in other.prompts[3].newest} & {id(r) for r in other.prompts[3].stored.values()}
    assert same  # what is new and stored is one thing, packed once


def test_an_empty_buffer_is_one(tmp_path):
    Buffer().snapshot()(tmp_path)
    buffer = Buffer()
    buffer.restore(tmp_path)
    assert len(buffer) == 0 and not buffer.seen


# ---- the order of prompts, and rows ----


def test_a_restored_order_asks_first_for_what_was_not_answered():
    one = Order(10, random.Random(3))
    taken = [next(one) for _ in range(14)]
    for prompt_id in taken[:11]:
        one.done(prompt_id)
    state = json.loads(json.dumps(one.state()))
    other = Order(10, random.Random(0))
    other.restore(state)
    assert [next(other) for _ in range(3)] == taken[11:]
    assert [next(other) for _ in range(40)] == [next(one) for _ in range(40)]
    assert sorted(taken[:10]) == list(range(10))


def test_rows_after_a_step_are_set_aside_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert set_aside(path, "step", 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "undone" / "metrics.jsonl").read_text() == '{"step": 3}\n{"step": 4, "lo'
    assert set_aside(tmp_path / "none.jsonl", "step", 2) == []


def test_a_last_row_without_its_end_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert set_aside(path, "step", 2) == [{"step": 1}] and path.read_text() == '{"step": 1}\n'


def test_rows_rotate(tmp_path):
    rows = Rows(tmp_path / "samples.jsonl", limit=50)
    for i in range(20):
        rows.append({"step": i, "text": "x" * 10})
        rows.flush()
    steps = [row["step"] for name in ("samples.1.jsonl", "samples.jsonl") for row in read(tmp_path / name)]
    assert steps == list(range(steps[0], 20)) and 2 <= len(steps) <= 6
