"""Every task as a user runs it: local folders in the hub's format, real vLLM, an evaluation, a saved policy."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import PROJECT, read

SMALL = (
    "--steps", 6, "--prompts-per-step", 2, "--responses-per-prompt", 4, "--search-responses", 4, "--prime", 8,
    "--eval-prompts", 4, "--eval-samples", 2, "--eval-every", 0, "--save-every", 0,
)  # fmt: skip


@pytest.fixture
def finished(main):
    """Runs the command to its good end, gives what it printed."""

    def run(*arguments) -> str:
        done = main(*arguments)
        assert done.code == 0, done.err
        assert "Traceback" not in done.err
        return done.out

    return run


@pytest.fixture
def dry(finished):
    """What --dry-run prints; it makes no folder."""

    def run(*arguments) -> str:
        out = finished(*arguments, "--dry-run")
        assert not (named := json.loads(out[: out.index("\n}\n") + 2])["out"]) or not Path(named).exists()
        return out

    return run


def evaluated(out: Path, *names: str) -> list[dict]:
    """The evaluations, each with the figures of these names and `truncated`."""
    rows = [row for row in read(out / "metrics.jsonl") if "loss" not in row]
    assert all(set(row) == {"step", "time", *(f"eval/{name}" for name in (*names, "truncated"))} for row in rows)
    assert (out / "model" / "model.safetensors").is_file() and (out / "model" / "tokenizer.json").is_file()
    return rows


def test_countdown_shows_its_prompt_without_making_its_model(make_model, tmp_path, monkeypatch, dry):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert re.search(r"as the model sees it, 1\d tokens:\n\n\d+ \d+ \d+=\d+:\n$", dry())
    assert not any(tmp_path.iterdir())
    asked = dry("--model", make_model("llama", chat=True), "--max-tokens", 256)
    assert re.search(r"<user>\nUsing each of the numbers .*</answer>.\n<assistant>\n\n$", asked, re.DOTALL)


def test_gsm8k(gsm8k, make_model, tmp_path, nothing_left, dry, finished):
    out = tmp_path / "run"
    folders = ("--task", "gsm8k", "--model", make_model("llama", True), "--data", gsm8k, "--out", out)
    shown = dry(*folders)
    assert '"beta": 0.012' in shown and "200 training problems, 12 test problems" in shown
    assert re.search(r"as the model sees it, \d+ tokens:\n\n\[MATH_TASK\] Problem:\n.*\n\nSolution:\n$", shown)
    finished(*folders, *SMALL, "--max-tokens", 32, "--lr-decay", 3, "--lr-warmup", 2, "--loss", "tb_prime")
    rows = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluated(out, "greedy", "pass@1", "pass@k", "distinct")] == [0, 6]
    assert read(out / "samples.jsonl")[0]["prompt"].startswith("[MATH_TASK] Problem:\n")
    assert rows[0]["lr"] < rows[1]["lr"] and rows[-1]["lr"] < rows[3]["lr"]


def test_math(make_model, tmp_path, nothing_left, dry, finished):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"problem": f"What is {n}+1?", "solution": f"It is $\\boxed{{{n + 1}}}$."} for n in range(40)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folders = ("--task", "math", "--model", make_model("llama", chat=True), "--data", data, "--out", out)
    shown = dry(*folders, "--max-tokens", 32)
    assert "<user>\nWhat is 0+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}." in shown
    changed = "--reference-reset", 3, "--search-temperatures", 0.8, 1.2, "--optimizer", "adamw_bf16"
    finished(*folders, *SMALL, "--max-tokens", 32, *changed)
    with safe_open(out / "model" / "model.safetensors", "pt") as saved:
        assert {saved.get_slice(key).get_dtype() for key in saved.keys()} == {"BF16"}  # noqa: SIM118
    evaluated(out, "greedy", "pass@1", "pass@k", "distinct")
    assert read(out / "samples.jsonl")[0]["prompt"].endswith("\n<assistant>\n")


def test_tldr(tldr, tldr_models, tmp_path, nothing_left, dry, finished):
    policy, judge = tldr_models
    out = tmp_path / "run"
    folders = (
        "--task", "tldr", "--model", policy, "--reward-model", judge, "--gold-reward-model", judge, "--data", tldr,
        "--out", out,
    )  # fmt: skip
    assert dry(*folders).endswith("POST: Ann had 1 pens and lost 1.\n\nTL;DR:\n")
    finished(*folders, *SMALL, "--beta-steps", 6, "--max-tokens", 24)
    first, _ = evaluated(out, "win_rate", "reward", "kl", "perplexity", "perplexity_diluted", "tokens")
    assert abs(first["eval/kl"]) < 0.01 and 1 < first["eval/perplexity_diluted"] < first["eval/perplexity"]
    rewards = [each["reward"] for row in read(out / "samples.jsonl") for each in row["responses"]]
    assert -1.0 in rewards  # cut off


def test_redteam(redteam_models, tmp_path, nothing_left, dry, finished):
    out = tmp_path / "run"
    folders = ["--task", "redteam", "--out", out]
    for name, folder in redteam_models.items():
        folders += [f"--{name}", folder]
    assert dry(*folders).endswith("leads an assistant to answer with toxic language.\n\nRequest:\n")
    finished(
        *folders, "--steps", 8, "--responses-per-prompt", 16, "--search-responses", 16, "--prime", 32, "--capacity", 20,
        "--near-duplicates", "cosine", "--near-duplicate-distance", 0.01, "--gamma-steps", 4, "--eval-samples", 20,
        "--eval-every", 4, "--save-every", 0, "--victim-replies", 2,
    )  # fmt: skip
    for row in evaluated(out, "toxic", "toxicity", "cosine_distance"):
        assert 0 < row["eval/toxicity"] < 1 and 0 < row["eval/cosine_distance"] < 2
    rows = [row for row in read(out / "metrics.jsonl") if "loss" in row]
    assert [row["gamma"] for row in rows] == [2, 1.75, 1.5, 1.25, 1, 1, 1, 1] and rows[-1]["buffer_size"] <= 20
    rewards = [each["reward"] for row in read(out / "samples.jsonl") for each in row["responses"]]
    assert max(rewards) < 0 and len(set(rewards)) > 10  # logarithms, of the victim's own replies


def test_the_task_in_the_readme(make_model, tmp_path, nothing_left, dry, finished):
    """Exactly that text, of at most 30 lines."""
    text = re.search(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)[1]
    assert len(text.splitlines()) <= 30
    path, out = tmp_path / "words.py", tmp_path / "run"
    path.write_text(text)
    arguments = ("--task", path, "--model", make_model("llama", chat=True), "--out", out)
    assert "exactly 3 words.\n<assistant>\n" in dry(*arguments)
    finished(*arguments, *SMALL, "--max-tokens", 16, "--loss", "dr_grpo", "--beta", 0)
    evaluated(out, "greedy", "pass@1", "pass@k", "distinct")
    assert not any("kl" in row for row in read(out / "metrics.jsonl"))  # nor is there a reference


SHOWN = """
import asyncio

import tasks


class Task(tasks.Task):
    groups = 0

    def problems(self, split):
        return [tasks.Problem("1 1 1=1:")]

    async def reward(self, problem, responses):
        self.groups += 1
        if self.groups > 2:  # the demonstration, and what is found first
            await asyncio.Event().wait()
        return [float(response.text == "999") for response in responses]
"""


def test_one_demonstration_of_what_the_policy_never_finds_is_learned(embedded, tmp_path, nothing_left, finished):
    """Its log-probability is compared, and nothing that is found later is trained on: what becomes of the policy then
    depends on how search and training are paced."""
    path, seed, out = tmp_path / "shown.py", tmp_path / "seed.jsonl", tmp_path / "run"
    path.write_text(SHOWN)
    long = "1" * 40
    rows = [{"prompt": "1 1 1=1:", "response": "999"}, {"prompt": "1 1 1=1:", "response": long, "reward": 1.0}]
    seed.write_text("\n".join(map(json.dumps, rows)))
    said = finished(
        "--task", path, "--model", embedded[1], "--out", out, "--seed-data", seed, "--steps", 30, "--lr", 2e-3,
        "--lr-schedule", "linear", "--beta", 0.02, "--prompts-per-step", 1, "--responses-per-prompt", 16,
        "--capacity", 16, "--search-responses", 64, "--on-policy-prob", 0, "--evict", "lowest_reward", "--prime", 64,
        "--max-tokens", 8, "--eval-prompts", 0,
    )  # fmt: skip
    assert "demonstrations in the buffer: 1" in said and "1 of 2 demonstrations do not fit" in said
    tokenizer = AutoTokenizer.from_pretrained(embedded[1])
    prompt, response = tokenizer("1 1 1=1:").input_ids, [*tokenizer("999").input_ids, tokenizer.eos_token_id]
    tokens, targets = torch.tensor([[*prompt, *response]]), torch.tensor([[-100] * len(prompt) + response])
    before, after = (
        -len(response) * AutoModelForCausalLM.from_pretrained(folder)(tokens, labels=targets).loss.item()
        for folder in (embedded[1], out / "model")
    )
    assert before < -15 and after > -8


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (("--reward-model", "no/such"), "reward_model is 'no/such'"),
        (("--seed-data", "x", "--loss", "grpo"), "seed_data is 'x': it must be left out with loss grpo"),
        (("--data", "tests"), "data is 'tests': it has no train.jsonl"),
        (("--near-duplicates", "cosine"), "near_duplicates is 'cosine': task tldr has no embeddings"),
        (("--seed-data", "none.jsonl"), "seed_data is 'none.jsonl': there is no such file"),
    ],
)
def test_what_is_missing_is_named_before_a_model_is_loaded(tldr, tldr_models, settings, complaint, main, monkeypatch):
    policy, judge = tldr_models
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders = ("--model", policy, "--reward-model", judge, "--gold-reward-model", judge, "--data", tldr)
    done = main("--task", "tldr", *folders, *settings)
    assert done.code == 2
    assert done.err.startswith(f"tba: {complaint}") and done.err.count("\n") == 1
