"""LoRA: an adapter is trained, the weights stay; engines, files and a resumed run have what the trainer has."""

import asyncio
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from config import Config
from run.cli import parse
from run.snapshot import trainer_writer
from search.searcher import Searcher
from search.weights import StagedWeights
from tasks import countdown_model
from tests import imported
from tests.runs import read, updates_of
from tests.test_engines import difference, settings
from tests.test_trainer import make, make_groups, update
from train.cuda import cast_linears
from train.lora import adapter_weights, add_adapter, merged_weights
from train.trainer import Trainer


def base_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the weights that are not trained."""
    return {name: w.detach().clone() for name, w in trainer.policy.named_parameters() if ".lora_" not in name}


@pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.long)])
def test_engine_and_trainer_agree_after_updates_of_an_adapter(make_model, tokenizer, tmp_path, monkeypatch, tie):
    folder, groups = str(make_model("llama", tie)), make_groups(len(tokenizer))
    trainer, tokens = make(folder, lora_rank=4), np.arange(20, 60, dtype=np.int32)
    weights = StagedWeights(trainer.layout, ["cpu"])
    monkeypatch.setattr("search.engine._serve", imported.serve)

    async def check() -> None:
        async with Searcher(settings(folder, tmp_path, 64), weights, max_tokens=8) as searcher:
            given = []
            for step in range(2):
                trainer.stage(weights, tokens, step)
                await searcher.load_weights()
                given.append(trainer.probe(tokens).numpy())
                assert difference(await searcher._all("prompt_logprobs", tokens.tolist()), given[-1]) < 1e-4
                for _ in range(5):
                    update(trainer, groups, lr=1e-2)
            assert np.abs(given[1] - given[0]).max() > 0.1  # or nothing is shown

    asyncio.run(check())


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])  # GPT-2's weights are [in, out]
def test_the_reference_is_the_policy_without_its_adapter(make_model, tokenizer, architecture):
    folder, groups = make_model(architecture, True), make_groups(len(tokenizer))
    trainer, full = make(folder, lora_rank=4), make(folder)
    assert trainer.reference is trainer.policy
    base, adapter = base_of(trainer), {name: w.clone() for name, w in adapter_weights(trainer.policy).items()}
    kl = [update(trainer, groups, lr=1e-2)["kl"] for _ in range(5)]
    assert abs(kl[0]) < 1e-5 < 1e-3 < abs(kl[-1])
    fresh, of_full = make_groups(len(tokenizer)), make_groups(len(tokenizer))
    trainer.score_reference(fresh), full.score_reference(of_full)
    for mine, other in zip(fresh, of_full, strict=True):
        for a, b in zip(mine.responses, other.responses, strict=True):
            assert np.array_equal(a.ref_logprobs, b.ref_logprobs)
    assert all(torch.equal(weight, base[name]) for name, weight in base_of(trainer).items())
    assert all(not torch.equal(w, adapter[name]) for name, w in adapter_weights(trainer.policy).items())
    assert update(trainer, groups)["grad_norm"] > 0  # what scored the reference is trained as before
    merged = trainer.weights()
    assert list(merged) == list(full.weights()) and {name: list(w.shape) for name, w in merged.items()} == dict(
        full.layout
    )
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.load_state_dict(merged)
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, trainer.policy(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
def test_beside_weights_in_bf16_an_adapter_is_fp32_and_is_merged_in_fp32(make_model, tie):
    """What CUDA does, with the CPU's autocast: the policy starts as exactly what it was."""
    folder, tokens = make_model("llama", tie), torch.arange(40)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = cast_linears(AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False), torch.bfloat16)
    add_adapter(model, Config(lora_rank=4, lora_alpha=12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(weight.dtype == torch.float32 for weight in trained.values())
    name = "model.layers.1.mlp.down_proj"
    A, B = trained[f"{name}.lora_A.default.weight"], trained[f"{name}.lora_B.default.weight"].data.normal_()
    merged, weights = dict(merged_weights(model)), dict(plain.named_parameters(remove_duplicate=False))
    expected = weights[f"{name}.weight"].bfloat16().float() + 3 * (B @ A)
    torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-5, rtol=1e-6)
    assert merged.keys() == weights.keys()
    assert torch.equal(merged["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_a_resumed_trainer_makes_the_updates_that_an_unbroken_one_makes(make_model, tokenizer, tmp_path):
    """Its checkpoint has the adapter and its optimiser, and no other weights."""
    folder, groups = make_model("llama"), make_groups(len(tokenizer))
    trainer = make(folder, lora_rank=4)
    for _ in range(2):
        update(trainer, groups)
    write = trainer_writer(trainer)

    def adapters(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
        found = []
        for _ in range(2):
            update(trainer, groups)
            found.append({name: w.clone() for name, w in adapter_weights(trainer.policy).items()})
        return found

    unbroken = adapters(trainer)  # training goes on while it is written
    write(tmp_path / "step-2")
    assert {path.name for path in (tmp_path / "step-2").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt"
    }  # fmt: skip
    resumed = make(folder, lora_rank=4, checkpoint=tmp_path / "step-2")
    torch.testing.assert_close(adapters(resumed), unbroken, atol=0, rtol=0)
    assert all(w.equal(base_of(trainer)[name]) for name, w in base_of(resumed).items())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


def test_what_a_run_leaves_loads_in_transformers_and_peft_and_a_resumed_run_equals_an_unbroken_one(
    embedded, tmp_path, nothing_left, main, monkeypatch
):
    """A reward easy to get; every sync is checked."""
    base, out, other = embedded[1], tmp_path / "one", tmp_path / "other"
    monkeypatch.setattr("tasks.countdown.reward", lambda text, answer: text.count("1"))
    done = main(
        "--model", base, "--out", out, "--steps", 6, "--strict", "--check-sync", "--lora-rank", 4, "--lr", 1e-2,
        "--lr-schedule", "constant", "--eval-prompts", 0, "--save-every", 4, "--keep", 0,
    )  # fmt: skip
    assert done.code == 0, done.err
    updates = updates_of(out)
    assert abs(updates[0]["kl"]) < 1e-5 < 1e-3 < updates[-1]["kl"]
    assert {path.name for path in (out / "checkpoints" / "step-6").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "buffer.safetensors", "state.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((out / "model" / "adapter" / "adapter_config.json").read_text()).items() >= {
        "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"
    }.items()  # fmt: skip
    merged = logits(AutoModelForCausalLM.from_pretrained(out / "model"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - merged).abs().max() > 0.1
    for model in (
        PeftModel.from_pretrained(plain, out / "model" / "adapter"),
        AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step-6"),
    ):
        torch.testing.assert_close(logits(model), merged, atol=1e-4, rtol=1e-4)

    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "step-6")  # it had been killed before
    done = main("--resume", other)
    assert done.code == 0, done.err
    for a, b in zip(updates, updates_of(other), strict=True):
        for name in ("loss", "grad_norm", "kl", "reward"):
            assert a[name] == pytest.approx(b[name], abs=1.1e-6, rel=1e-5), name


@pytest.mark.long
def test_an_adapter_learns_countdown(tmp_path, main):
    folder, out = tmp_path / "model", tmp_path / "run"
    folder.mkdir()
    countdown_model.warm_up(folder, seed=0, numbers=3, steps=400)
    done = main("--model", folder, "--out", out, "--steps", 300, "--lora-rank", 16, "--lr", 3e-3, "--eval-prompts", 200)
    assert done.code == 0, done.err
    first, *_, last = (row["eval/pass@1"] for row in read(out / "metrics.jsonl") if "eval/pass@1" in row)
    assert last > first + 0.15


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--lora-rank", "-1"], "lora_rank is -1: it must be at least 0 and finite"),
        (["--lora-alpha", "16"], "lora_alpha is 16: it must be 0 without lora_rank"),
        (
            ["--lora-rank", "8", "--optimizer", "adamw_8bit"],
            "optimizer is 'adamw_8bit': it must be adamw with lora_rank",
        ),
        (
            ["--lora-rank", "8", "--reference-reset", "9"],
            "reference_reset is 9: it must be 0 with lora_rank, where the",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, complaint):
    with pytest.raises(ValueError, match=f"^{complaint}"):
        parse(flags)


def test_without_peft_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("run.check.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^lora_rank is 8: it must be 0, or peft must be installed: pip install peft$"
    ):
        parse(["--lora-rank", "8"])
    assert parse([]).lora_rank == 0
