"""The main job as a user runs it: the command in a process of its own, with real vLLM engines."""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from run.cli import parse
from run.devices import cpu_affinity
from run.setup import prepare
from search.weights import StagedWeights
from tests.runs import nothing_is_left, read, started
from tools.report import read_run

FIELDS = {
    "step", "time", "loss", "reward", "kl", "entropy", "grad_norm", "lr", "beta", "age_mean", "age_max", "buffer_size",
    "search_tokens_per_s", "train_tokens_per_s", "search_idle", "train_idle", "sync_ms", "sync_diff_mean",
    "sync_diff_max",
}  # fmt: skip


@pytest.fixture(scope="module")
def short_run(embedded, tmp_path_factory):
    """A run of 60 updates."""
    out = tmp_path_factory.mktemp("runs") / "short"
    arguments = (
        "--model", embedded[1], "--out", out, "--steps", 60, "--prime", 64, "--eval-prompts", 24, "--eval-every", 25,
        "--save-every", 40,
    )  # fmt: skip
    with nothing_is_left(), started(*arguments) as run:
        run.process.join(200)
        said = run.said()
    assert run.process.exitcode == 0, said
    return out, said


def test_what_a_run_leaves(short_run):
    out, said = short_run
    rows = read(out / "metrics.jsonl")
    updates = [row for row in rows if "loss" in row]
    assert [row["step"] for row in updates] == list(range(1, 61))
    for row in updates:
        assert set(row) >= FIELDS
        assert all(isinstance(row[name], (int, float)) and abs(row[name]) < 1e9 for name in FIELDS)
    assert all(a["time"] < b["time"] for a, b in itertools.pairwise(updates))
    evaluations = [row for row in rows if "eval/pass@1" in row]
    steps = [row["step"] for row in evaluations]
    assert steps[0] == 0 and steps[-1] == 60 and len(steps) == 4
    for row in evaluations:
        assert 0 <= row["eval/pass@1"] <= row["eval/pass@k"] <= 1
        assert 0 <= row["eval/greedy"] <= 1 and 0 <= row["eval/distinct"] <= 8
    samples = read(out / "samples.jsonl")
    assert len(samples) == 60 and len(samples[0]["responses"]) == 16
    assert json.loads((out / "config.json").read_text())["steps"] == 60
    assert "pass@1" in said and str(out) in said and "Traceback" not in said
    best = max(evaluations[1:], key=lambda row: (row["eval/pass@1"], row["step"]))["step"]
    assert (out / "checkpoints" / "best").resolve().name == f"step-{best}"
    kept = {folder.name for folder in (out / "checkpoints").iterdir()}
    assert kept == {"step-50", "step-60", f"step-{best}", "best"}  # of 25, 40, 50, 60
    assert (out / "checkpoints" / "step-60" / "model.safetensors").is_file()
    assert f"open {out}/report.html" in said and read_run(out)["steps"] == 60
    assert '"steps": 60' in (out / "report.html").read_text()
    assert "step 25: greedy 0." in said  # each evaluation, when it ends


def spans(out: Path, what: str) -> list[tuple[float, float]]:
    return [(row["start"], row["end"]) for row in read(out / "timeline.jsonl") if row["what"] == what]


def test_search_and_training_are_busy_in_the_same_seconds(short_run):
    out, _ = short_run
    updates = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    assert statistics.median(row["search_idle"] for row in updates) < 0.1
    assert statistics.median(row["train_idle"] for row in updates) < 0.5
    searches, updates = spans(out, "search"), spans(out, "train")
    inside = [any(s < end and begin < e for s, e in searches) for begin, end in updates]
    assert sum(inside) > 0.9 * len(updates)


def test_a_prompt_is_searched_as_soon_as_there_is_room_for_its_responses(short_run):
    """256 are in flight, 16 to a prompt: more than 16 prompts are searched where some of their responses have ended."""
    changes = sorted(
        (at, change) for begin, end in spans(short_run[0], "search") for at, change in ((begin, 1), (end, -1))
    )
    at_a_time = list(itertools.accumulate(change for _, change in changes))
    assert 16 < max(at_a_time) < 256


def test_updates_go_on_while_a_sync_is_under_way(short_run):
    out, _ = short_run
    syncs, updates = spans(out, "sync"), spans(out, "train")
    assert len(syncs) >= 10
    meet = [any(begin < e and s < end for s, e in updates) for begin, end in syncs]
    assert sum(meet) > 0.5 * len(syncs)


def test_search_uses_new_weights(short_run):
    """Ages stay within a few syncs of the newest: responses carry the version of the weights that began them."""
    out, _ = short_run
    last = [row for row in read(out / "metrics.jsonl") if "loss" in row][-1]
    assert 0 <= last["age_mean"] < 30 and last["sync_ms"] > 0


def test_engines_and_trainer_agree_after_each_sync(short_run):
    out, _ = short_run
    differences = [
        (row["sync_diff_mean"], row["sync_diff_max"]) for row in read(out / "metrics.jsonl") if "loss" in row
    ]
    assert len(set(differences)) > 10  # each is measured
    assert all(0 <= mean <= largest < 1e-4 for mean, largest in differences)


def test_the_event_loop_leaves_engines_on_the_cpu_their_cores(embedded, few_problems):
    setup, before = prepare(parse(["--model", str(embedded[1])])), os.sched_getaffinity(0)
    assert setup.loop_cores == setup.train_cores
    with cpu_affinity(setup.loop_cores):
        assert os.sched_getaffinity(0) == setup.train_cores
    assert os.sched_getaffinity(0) == before
    assert len(before) == 1 or not setup.train_cores & setup.search_cores


def test_the_policy_loads_in_transformers_and_in_vllm_with_the_same_greedy_answers(short_run, embedded):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = short_run
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    prompts = ["12 45 33=24:", "1 2 3=6:", "50 20 7=77:", "9 9 30=12:"]
    expected = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            expected.append(model.generate(tokens, do_sample=False, max_new_tokens=10)[0, tokens.shape[1] :].tolist())
    script = (
        "import json, sys\n"
        "if __name__ == '__main__':\n"
        "    from vllm import LLM, SamplingParams\n"
        "    llm = LLM(sys.argv[1], dtype='float32', enforce_eager=True, kv_cache_memory_bytes=2**28)\n"
        "    greedy = SamplingParams(temperature=0, max_tokens=10)\n"
        "    out = llm.generate(json.loads(sys.argv[2]), greedy, use_tqdm=False)\n"
        "    print(json.dumps([list(o.outputs[0].token_ids) for o in out]))\n"
    )
    path = out / "load.py"
    path.write_text(script)
    arguments = [sys.executable, str(path), str(out / "model"), json.dumps(prompts)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ | ONE_PROCESS)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_a_sync_that_went_wrong_stops_the_run(embedded, tmp_path, nothing_left, main, monkeypatch):
    """From the fourth copy on, one weight of the staged ones is spoiled."""
    out, copies = tmp_path / "run", []

    def spoil(weights, *arguments, write=StagedWeights.write):
        write(weights, *arguments)
        copies.append(1)
        if len(copies) >= 4:
            next(weight for name, weight in weights.views.items() if "down_proj" in name).view(-1)[7] += 5.0

    monkeypatch.setattr(StagedWeights, "write", spoil)
    done = main(
        "--model", embedded[1], "--out", out, "--steps", 400, "--prime", 64, "--eval-prompts", 0, "--check-sync"
    )
    assert done.code == 1
    assert "the engine on cpu and the trainer differ by" in done.err and "above 0.001" in done.err
    updates = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    assert 4 <= len(updates) < 50 and updates[3]["sync_diff_max"] < 1e-4


def test_a_reward_that_always_fails_ends_everything_and_is_said(embedded, tmp_path, nothing_left, main, monkeypatch):
    def broken(text, answer):
        raise RuntimeError("the reward broke")

    monkeypatch.setattr("tasks.countdown.reward", broken)
    done = main("--model", embedded[1], "--out", tmp_path / "run", "--steps", 50, "--eval-prompts", 0)
    assert done.code == 1 and "Traceback" not in done.err
    said = (
        r"tba: the reward failed for (2\d\d) of the last \1 responses; the first time: RuntimeError: the reward broke"
    )
    assert re.search(said, done.err)
