"""A folder that exists is complete, the right ones stay, and a run's folder has one run."""

import dataclasses
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from buffer import Buffer, Group, Response
from run.checkpoint import Checkpoints, clean_up, lock, newest, write_atomically
from run.snapshot import buffer_writer, read_buffer
from tests.runs import PROJECT


@pytest.fixture
def logged(caplog, monkeypatch):
    """What is logged, whatever handler the command has given the logger."""
    monkeypatch.setattr(logging.getLogger("tba"), "propagate", True)
    caplog.set_level(logging.INFO, "tba")
    return caplog


def a_file(folder):
    (folder / "weights").write_bytes(b"0123456789")


def saved(out, *steps, keep=0, scores=(), protected=None, write=a_file):
    with Checkpoints(out, keep) as checkpoints:
        checkpoints.scores, checkpoints.protected = dict(scores), protected
        for step in steps:
            checkpoints.save({"step": step}, write)
    return checkpoints


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_newest_stay_and_the_best(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2, scores={1: 0.5, 2: 0.7, 3: 0.1})
    assert names(tmp_path) == ["best", "step-2", "step-3", "step-4"]
    assert (tmp_path / "checkpoints" / "best" / "weights").read_bytes() == b"0123456789"
    saved(tmp_path, 5, keep=2, scores={2: 0.7}, protected=3)  # 3 is being evaluated
    assert names(tmp_path) == ["best", "step-2", "step-3", "step-4", "step-5"]
    with Checkpoints(tmp_path, 2) as again:
        again.scores = {2: 0.7}
        again.score(5, {"accuracy": 0.9, "length": 3.0}, "accuracy")
    assert names(tmp_path) == ["best", "step-4", "step-5"]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-5"


def test_without_the_figure_that_tells_the_best_none_is_and_that_is_logged_once(tmp_path, logged):
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step in (1, 2):
            checkpoints.save({"step": step}, a_file)
            checkpoints.score(step, {"length": 3.0}, "accuracy")
    assert names(tmp_path) == ["step-2"] and all(map(math.isnan, checkpoints.scores.values()))
    assert logged.text.count("no checkpoint is marked as the best: `evaluate` gives no 'accuracy'") == 1


def test_all_stay_with_keep_0(tmp_path):
    (tmp_path / "checkpoints" / "step-2-mine").mkdir(parents=True)  # is nobody's concern
    saved(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-1", "step-2", "step-2-mine", "step-3"]
    assert newest(tmp_path)[1]["step"] == 3


def test_what_cannot_be_written_leaves_nothing_and_removes_nothing(tmp_path, logged):
    def full(folder):
        a_file(folder)
        raise OSError(28, "No space left on device")

    saved(tmp_path, 1, keep=1)
    checkpoints = saved(tmp_path, 2, keep=1, write=full)
    assert names(tmp_path) == ["step-1"] and "No space left" in checkpoints.failed
    assert "step-2 cannot be written ([Errno 28] No space left on device): those before it stay" in logged.text
    checkpoints = saved(tmp_path, 2, 3, keep=1)
    assert names(tmp_path) == ["step-3"] and not checkpoints.failed


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    def look(folder):
        a_file(folder)
        assert not (tmp_path / "model").exists()

    write_atomically(tmp_path / "model", look)
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "model", lambda folder: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # as it was
    write_atomically(tmp_path / "model", lambda folder: (folder / "new").write_text("2"))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "no state"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(tmp_path, logged, damage):
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
    folder, state = newest(tmp_path)
    assert folder.name == "step-2" and state["step"] == 2
    assert "step-10 is damaged" in logged.text
    (tmp_path / "checkpoints" / "step-11.tmp").mkdir()
    clean_up(tmp_path, 2)
    assert names(tmp_path) == ["step-1", "step-10.damaged", "step-2"]
    logged.clear()
    assert newest(tmp_path)[0] == folder and not logged.text


def test_there_may_be_none(tmp_path):
    assert newest(tmp_path) is None


def test_a_folder_has_one_run(tmp_path):
    locked = lock(tmp_path)
    with pytest.raises(ValueError, match=f"another run \\(process {os.getpid()}\\) is writing there"):
        lock(tmp_path)
    locked.close()
    program = "import sys, pathlib; from run.checkpoint import lock; "
    program += "locked = lock(pathlib.Path(sys.argv[1])); print(1, flush=1); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=PROJECT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=f"process {other.pid}"):
            lock(tmp_path)
        other.kill()
    lock(tmp_path).close()  # however the other ended


# ---- the buffer ----


def response(rng, reward, logprobs=True, per_token=()):
    tokens = rng.integers(0, 9, rng.integers(1, 6)).astype(np.int32)
    values = rng.random(len(tokens)).astype(np.float32)
    version, finished, embedding = int(rng.integers(9)), bool(rng.random() < 0.5), np.ones(2, np.float32)
    names = {name: values + len(name) for name in per_token} or None
    logprobs = values if logprobs else None
    return Response(tokens, finished, version, reward, logprobs=logprobs, embedding=embedding, per_token=names)


def filled(**settings):
    rng, buffer = np.random.default_rng(0), Buffer(capacity=5, **settings)
    for i in range(60):
        prompt_id = int(rng.integers(9))
        names = [(), ("entropy",), ("entropy", "of my own")][i % 3]
        responses = [response(rng, float(rng.normal()), i % 2, names) for _ in range(4)]
        buffer.add(Group(prompt_id, np.arange(1 + prompt_id, dtype=np.int32), [*responses, responses[0]]))
        if i == 40:
            buffer.start_window()
    for group in buffer.sample(4, 4, 0.5):
        for each in group.responses:
            each.ref_logprobs, each.ref_version = np.full(len(each.tokens), -0.5, np.float32), 3
    return buffer


FIELDS = [field.name for field in dataclasses.fields(Response)]


def described(batches):
    def plain(value):
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return value.tolist() if isinstance(value, np.ndarray) else value

    return [
        (g.prompt_id, g.prompt.tolist(), [[plain(getattr(r, name)) for name in FIELDS] for r in g.responses])
        for groups in batches
        for g in groups
    ]


@pytest.mark.parametrize("max_bytes", [math.inf, 20_500])  # all of 45 responses, or some
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_restored_buffer_goes_on_as_the_one_that_was_saved(tmp_path, max_bytes, on_disk):
    one, other = filled(max_bytes=max_bytes, min_prompts=4), Buffer(5, max_bytes=max_bytes, min_prompts=4)
    assert len(one) == (45 if max_bytes == math.inf else 19)
    write, state = buffer_writer(one), one.state_dict()
    untouched = described([one.sample(4, 6, 0.5) for _ in range(9)])
    rng = np.random.default_rng(5)
    one.add(Group(77, np.array([1], np.int32), [response(rng, 0.0)]))  # goes on while it is written
    write(tmp_path)
    other.load_state_dict(read_buffer(tmp_path) if on_disk else state)
    assert described([other.sample(4, 6, 0.5) for _ in range(9)]) == untouched
    other.add(Group(77, np.array([1], np.int32), [response(np.random.default_rng(5), 0.0)]))
    for buffer in (one, other):  # both evict the same, from all and from one
        rng = np.random.default_rng(1)
        for prompt_id in (3, 3, 4, 100):
            buffer.add(Group(prompt_id, np.array([1], np.int32), [response(rng, 0.1 * i) for i in range(3)]))
    assert (one.gauges(), one.prompt_ids) == (other.gauges(), other.prompt_ids)
    assert (list(one.by_recency), one.window) == (list(other.by_recency), other.window)
    assert described([one.sample(4, 6, 0.5)]) == described([other.sample(4, 6, 0.5)])
    same = {id(r) for r in other.prompts[3].last_group} & {id(r) for r in other.prompts[3].stored.values()}
    assert same  # what is new and stored is one object, packed once


def test_per_token_values_of_any_name_are_saved_and_none_where_a_response_has_none(tmp_path):
    one, other, tokens = Buffer(), Buffer(), np.arange(3, dtype=np.int32)
    names = [None, {"mine": np.array([1, 2, 3], np.float32)}, {"a.b": np.ones(3, np.float32), "mine": np.zeros(3)}]
    responses = [Response(tokens + i, True, per_token=each) for i, each in enumerate(names)]
    one.add(Group(0, tokens, responses))
    buffer_writer(one)(tmp_path)
    other.load_state_dict(read_buffer(tmp_path))
    first, second, third = other.prompts[0].last_group
    assert first.per_token is None and second.per_token.keys() == {"mine"} and third.per_token.keys() == {"a.b", "mine"}
    assert second.per_token["mine"].tolist() == [1, 2, 3] and third.per_token["a.b"].tolist() == [1, 1, 1]
    assert third.per_token["mine"].tolist() == [0, 0, 0] and third.per_token["mine"].dtype == np.float32
    assert other.nbytes == one.nbytes


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_reference_is_saved_as_it_was_when_the_state_was_taken(tmp_path, on_disk):
    """All else of a stored response stays as it is; training goes on while it is written."""
    one, other, tokens = Buffer(), Buffer(), np.arange(3, dtype=np.int32)
    one.add(Group(0, tokens, [response := Response(tokens, True, ref_logprobs=np.ones(3, np.float32), ref_version=1)]))
    write, state = buffer_writer(one), one.state_dict()
    response.ref_logprobs, response.ref_version = np.zeros(3, np.float32), 2
    write(tmp_path)
    other.load_state_dict(read_buffer(tmp_path) if on_disk else state)
    (restored,) = other.prompts[0].last_group
    assert restored.ref_logprobs.tolist() == [1, 1, 1] and restored.ref_version == 1


def test_an_empty_buffer_can_be_saved(tmp_path):
    buffer_writer(Buffer())(tmp_path)
    buffer = Buffer()
    buffer.load_state_dict(read_buffer(tmp_path))
    assert len(buffer) == 0 and not buffer.prompt_ids
