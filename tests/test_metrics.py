"""What a run records: its files, and the same in the tools that a user has."""

import contextlib
import json
import logging
import math
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

import run.metrics
from buffer import Group, Response
from config import Config, RunError
from run.metrics import Jsonl, Metrics, truncate_after
from tests.runs import read

FIGURES = {"loss": 1.0, "grad_norm": 2.0, "entropy": math.nan, "tokens": 100}
PROMPTS = [SimpleNamespace(text="prompt")] * 8
GROUP = Group(0, np.array([1]), [Response(np.array([1], np.int32), True, 1, 0.5)])
TOKENIZER = SimpleNamespace(batch_decode=lambda rows, skip_special_tokens: ["text"] * len(rows))


def record(out, step: int, **settings) -> None:
    """What a run writes that has made `step` updates before: two more, and an evaluation."""
    with Metrics(out, Config(model="m", steps=9, **settings), TOKENIZER, step) as metrics:
        metrics.start_clock()
        for done in (step, step + 1):
            metrics.update(done, [GROUP], FIGURES | {"kl": done + step / 10}, PROMPTS)
        metrics.evaluation(step + 2, {"pass@1": 0.75 + step / 10, "broken": math.nan})


@pytest.fixture
def logged(caplog, monkeypatch):
    """What the run logs, whatever handler the command has given its logger."""
    monkeypatch.setattr(logging.getLogger("tba"), "propagate", True)
    caplog.set_level(logging.INFO, "tba")
    return caplog


# ---- the files ----


def test_rates_and_shares_are_of_the_time_since_the_update_before(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run.metrics.time, "perf_counter", lambda: now[0])
    old, new = (Response(np.zeros(50, np.int32), True, 0, reward) for reward in (0.0, 1.0))
    with Metrics(tmp_path, Config(steps=3), TOKENIZER, 6, 1000.0) as metrics:
        metrics.reward = 0.125  # a checkpoint's
        assert metrics.seconds == 1000
        metrics.evaluation(6, {"pass@1": 0.5})
        now[0] += 7
        metrics.start_clock()
        metrics.add([old])
        now[0] += 3
        metrics.mark()
        for step, (found, searching) in enumerate([([old, new, new], 2), ([], 0), ([old], 4)], 6):
            with contextlib.ExitStack() as searches:  # which overlap: what counts is that any is open
                for _ in range(2 * bool(searching)):
                    searches.enter_context(metrics.span("search"))
                with metrics.span("train") as span:
                    assert metrics.under_way["train"] == 1 and metrics.under_way["search"] == 2 * bool(searching)
                    now[0] += 1
                assert span.seconds == 1
                with contextlib.suppress(KeyError), metrics.span("train"):
                    now[0] += 1
                    raise KeyError  # time that is spent in vain is spent
                if searching == 2:
                    searches.close()
                now[0] += 2
            metrics.add(found)
            metrics.update(step, [GROUP], FIGURES | {"search_paused": 1}, PROMPTS)
        assert not +metrics.under_way and metrics.busy["train"] == 6 and metrics.reward == 0
    first, *rows = read(tmp_path / "metrics.jsonl")
    assert first == {"step": 6, "time": 1000.0, "eval/pass@1": 0.5}
    assert [(row["step"], row["time"]) for row in rows] == [(7, 1007.0), (8, 1011.0), (9, 1015.0)]
    assert [row["reward"] for row in rows] == [0.666667, 0.666667, 0]
    assert [row["search_tokens_per_s"] for row in rows] == [37.5, 0, 12.5]
    assert [row["search_idle"] for row in rows] == [0.5, 1, 0]
    assert {name: {row[name] for row in rows} for name in ("train_idle", "train_tokens_per_s", "search_paused")} == {
        "train_idle": {0.5}, "train_tokens_per_s": {25.0}, "search_paused": {1},
    }  # fmt: skip
    assert [(row["age_mean"], row["age_max"]) for row in rows] == [(5, 5), (6, 6), (7, 7)]
    assert "tokens" not in rows[0] and rows[0]["entropy"] is None
    spans = [(row["what"], row["start"], row["end"]) for row in read(tmp_path / "timeline.jsonl")]
    assert spans[:2] == [("train", 1003.0, 1004.0), ("search", 1003.0, 1005.0)] and len(spans) == 7
    sample = {"step": 8, "prompt": "prompt", "responses": [{"text": "text", "reward": 0.5, "age": 6}]}
    assert read(tmp_path / "samples.jsonl")[1] == sample


def test_updates_without_a_finite_gradient_are_counted_and_end_the_run_after_ten_in_a_row(tmp_path, logged):
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    with Metrics(tmp_path, Config(steps=99), TOKENIZER) as metrics:
        metrics.start_clock()
        losses = [math.nan] * 9 + [1.0] + [math.nan] * 10
        with pytest.raises(RunError, match="10 updates in a row had no finite loss or gradient: a lower --lr may help"):
            for step, loss in enumerate(losses):
                metrics.update(step, [GROUP] * 4, FIGURES | {"loss": loss}, PROMPTS)
        assert step == 19 and metrics.diverged and metrics.skipped == 19
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [*range(1, 10), *range(9, 20)] and rows[-1]["loss"] is None
    assert logged.messages[0].startswith(
        "update 1 is skipped: its loss is nan, the norm of its gradient 2; its prompts"
    )
    assert logged.messages[0].endswith("and 1 more")


def test_a_resumed_run_removes_what_it_will_make_again(tmp_path):
    record(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # it was killed
    with Metrics(tmp_path, Config(steps=9), TOKENIZER, 1) as metrics:
        assert metrics.evaluations == {}
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1]
    assert [row["step"] for row in read(tmp_path / "samples.jsonl")] == [1]
    record(tmp_path, 1)
    with Metrics(tmp_path, Config(steps=9), TOKENIZER, 3) as metrics:
        assert metrics.evaluations[3]["pass@1"] == 0.85 and math.isnan(metrics.evaluations[3]["broken"])


def test_an_incomplete_last_row_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"step": 2}\n{"step": 2')
    assert truncate_after(path, "step", 2) == [{"step": 1}, {"step": 2}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    path.write_text('{"step": 1}\n{"step": 2}')
    assert truncate_after(path, "step", 2) == [{"step": 1}] and path.read_text() == '{"step": 1}\n'
    assert truncate_after(tmp_path / "none.jsonl", "step", 2) == []


def test_samples_rotate(tmp_path, monkeypatch):
    monkeypatch.setattr(run.metrics, "SAMPLES_BYTES", 400)
    for step in range(0, 24, 2):
        record(tmp_path, step)
    steps = [row["step"] for name in ("samples.1.jsonl", "samples.jsonl") for row in read(tmp_path / name)]
    assert steps == list(range(steps[0], 25)) and 2 <= len(steps) <= 9
    assert len(read(tmp_path / "metrics.jsonl")) == 36
    assert {path.stem for path in tmp_path.iterdir()} == {"metrics", "timeline", "samples", "samples.1"}


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path, monkeypatch, logged):
    with Metrics(tmp_path, Config(steps=9), TOKENIZER) as metrics:
        metrics.start_clock()
        for step in range(4):
            monkeypatch.setattr(metrics.files["metrics"], "path", tmp_path / "metrics.jsonl")
            if step in (1, 2):
                monkeypatch.setattr(metrics.files["metrics"], "path", run.metrics.Path("/dev/full"))
            metrics.update(step, [GROUP], FIGURES, PROMPTS)
    lines = [record.message for record in logged.records if "cannot be written" in record.message]
    assert len(lines) == 1 and lines[0].startswith("/dev/full cannot be written ([Errno 28]")
    for name in ("metrics", "samples"):
        assert [row["step"] for row in read(tmp_path / f"{name}.jsonl")] == [1, 2, 3, 4]
    with Metrics(tmp_path, Config(steps=9), TOKENIZER, 4) as metrics:
        metrics.files["metrics"].path = run.metrics.Path("/dev/full")
        metrics.evaluation(4, {"pass@1": 0.5})
    assert logged.records[-1].message == "the last rows of /dev/full are lost"


def test_a_write_may_take_a_part_of_the_rows_before_the_disk_is_full(tmp_path, monkeypatch):
    file, taken = Jsonl(tmp_path / "rows.jsonl"), bytearray()

    def write(data: bytes) -> int:
        if len(taken) == 14:
            raise OSError
        taken.extend(data[:7])
        return 7

    file.append({"text": "x" * 100})
    whole = file.unwritten
    device = SimpleNamespace(write=write, tell=lambda: 0)
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(file, "path", SimpleNamespace(open=lambda *_, **__: contextlib.nullcontext(device)))
        file.flush()
    file.flush()
    assert bytes(taken) + (tmp_path / "rows.jsonl").read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError):
        Metrics(tmp_path / "none", Config(), TOKENIZER)


# ---- trackers ----


def test_tensorboard_has_every_figure_and_what_is_made_again_once(tmp_path, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, 0, tensorboard=True)
    assert "step 2: pass@1 0.750, broken nan" in logged.messages
    record(tmp_path, 1, tensorboard=True)  # resumed from the checkpoint of update 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(read(tmp_path / "metrics.jsonl")[0]) - {"step", "entropy"}  # nan is in neither
    assert {"reward", "kl", "batch_reward", "age_max", "search_tokens_per_s", "train_idle", "time"} <= names
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names} | {"eval/pass@1"}
    found = {name: [(e.step, round(e.value, 3)) for e in events.Scalars(name)] for name in ("train/kl", "eval/pass@1")}
    assert found == {"train/kl": [(1, 0.0), (2, 1.1), (3, 2.1)], "eval/pass@1": [(3, 0.85)]}
    assert [row["kl"] for row in read(tmp_path / "metrics.jsonl") if "kl" in row] == [0.0, 1.1, 2.1]


@contextlib.contextmanager
def weights_and_biases(monkeypatch, mode: str) -> Iterator[None]:
    """Its process, which it keeps as long as this one lives, lives so long."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", mode)
    yield
    wandb.teardown()


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in which a record may be cut into pieces."""
    block, header, at, record = 2**15, 7, 7, b""  # the file's own header is as long
    while at < len(data):
        if at % block > block - header:  # too short for another
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + header])
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def test_weights_and_biases_gets_every_figure_and_a_resumed_run_goes_on_with_it(tmp_path, monkeypatch, nothing_left):
    """Offline, read from the file that it would send."""
    from wandb.proto import wandb_internal_pb2

    with weights_and_biases(monkeypatch, "offline"):
        for step in (0, 1):
            record(tmp_path, step, wandb=True)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one run
    found, settings = [], {}
    for file in files:
        for entry in map(wandb_internal_pb2.Record.FromString, records(file.read_bytes())):
            items = {item.nested_key[0] if item.nested_key else item.key: item for item in entry.history.item}
            found.append({name: json.loads(item.value_json) for name, item in items.items() if name[0] != "_"})
            settings |= {update.key: json.loads(update.value_json) for update in entry.run.config.update}
    kl = [(row["step"], row["train/kl"]) for row in found if "train/kl" in row]
    assert kl == [(1, 0.0), (2, 1.0), (2, 1.1), (3, 2.1)]
    assert [(row["step"], row["eval/pass@1"]) for row in found if "eval/pass@1" in row] == [(2, 0.75), (3, 0.85)]
    assert settings["steps"] == 9 and settings["model"] == "m"


@pytest.mark.parametrize("when", ["write", "close"])
def test_a_tracker_that_fails_is_left_out_and_said_once(tmp_path, monkeypatch, logged, when):
    def fail(*_):
        raise ConnectionError("gone")

    calls = {"write": lambda *_: None, "close": lambda: None} | {when: fail}
    monkeypatch.setitem(run.metrics.TRACKERS, "wandb", lambda *_: (calls["write"], calls["close"]))
    with Metrics(tmp_path, Config(steps=3, wandb=True), TOKENIZER) as metrics:
        for step in (1, 2):
            metrics.evaluation(step, {"pass@1": 0.5})
    lines = [record.message for record in logged.records if record.levelname == "WARNING"]
    assert lines == ["wandb gets no more metrics (gone): metrics.jsonl has them all"]
    assert len(read(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_not_installed_is_named_before_anything_is_loaded(name, main, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    done = main(f"--{name}", "--out", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert done.err == f"tba: {name} is not installed: pip install {name}, or leave --{name} out\n"


def test_what_weights_and_biases_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with (
        weights_and_biases(monkeypatch, "online"),
        pytest.raises(ValueError, match=r"^wandb cannot begin: .*WANDB_MODE=offline, helps\)$"),
    ):
        Metrics(tmp_path, Config(model="m", wandb=True), TOKENIZER)
