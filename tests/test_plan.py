"""The plan says what real updates take, and what to change where there is too little memory."""

import ctypes
import gc
import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import plan
from config import Config
from loss import tb
from optimizer import OPTIMIZERS
from rehearsal import Needs, batch, rehearse
from tests.runs import forked, forkserver
from trainer import Trainer

GIB = 2**30
SHAPES = {  # architecture, its sizes, the run's settings, the longest prompt
    "most is weights and moments": (
        "llama",
        dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=4000),
        dict(responses_per_prompt=4, max_tokens=12, micro_batch_tokens=140),
        20,
    ),
    "most is activations": (
        "gpt_neox",
        dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=256),
        dict(responses_per_prompt=8, max_tokens=128, micro_batch_tokens=5000),
        64,
    ),
    "a large vocabulary, tied": (
        "gpt2",
        dict(n_embd=128, n_layer=2, n_head=4, vocab_size=50257),
        dict(responses_per_prompt=4, max_tokens=24, micro_batch_tokens=250),
        24,
    ),
}


def model_config(shape: str, **sizes):
    architecture, own, _, _ = SHAPES[shape]
    ends = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return AutoConfig.for_model(architecture, **ends, tie_word_embeddings="tied" in shape, **own | sizes)


def settings(shape: str) -> tuple[Config, int, int]:
    """The run's, the longest prompt, and the tokens of a forward pass."""
    _, _, own, prompt = SHAPES[shape]
    return Config(prompts_per_step=4, **own), prompt, own["micro_batch_tokens"]


def resident(which: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at most since that was reset."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(shape: str, answer) -> None:
    """Send what two updates take at their peak beside what the process took before, in a process of its own."""
    torch.set_num_threads(1)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, libc = -1, -3, ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 0), libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back at once
    config, prompt, tokens = settings(shape)
    small = dict(n_embd=64) if "gpt2" in SHAPES[shape] else dict(hidden_size=64, intermediate_size=64)
    groups, _ = batch(config, 4, 4, share=True)
    Trainer(model_config(shape, **small), tb, "cpu", micro_batch_tokens=1).update(groups[:1], 1.0, 1e-6)
    gc.collect()  # all code is loaded, all threads run
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trainer = Trainer(model_config(shape), tb, "cpu", micro_batch_tokens=tokens)
    groups, _ = batch(config, prompt, tokens, share=True)
    if not trainer.shares(groups):
        groups, _ = batch(config, prompt, tokens, share=False)
    for response in itertools.chain.from_iterable(group.responses for group in groups):
        response.ref_logprobs = None  # is the trainer's to compute
    for _ in range(2):
        trainer.update(groups, 1.0, 1e-6)
    answer.send(resident("VmHWM") - before)


@pytest.fixture(scope="module")
def measured():
    """Peaks by shape, in bytes."""
    answers = {}
    for shape in SHAPES:
        answers[shape], end = forkserver.Pipe(duplex=False)
        forked(measure, shape, end)
        end.close()
    return {shape: answer.recv() for shape, answer in answers.items()}


def planned(shape: str) -> Needs:
    config, prompt, tokens = settings(shape)
    return rehearse(model_config(shape), config, prompt, tokens, gpu=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_planned_peak_is_the_measured_one(shape, measured):
    needs = planned(shape)
    print(f"{shape}: planned {needs.peak / 2**20:.0f} MiB, measured {measured[shape] / 2**20:.0f} MiB")
    assert needs.peak == pytest.approx(measured[shape], rel=0.1) and needs.peak > 300e6
    large = needs.activations > needs.peak / 2
    assert large == (not shape.startswith("most is weights"))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape, gpu):
    config = Config(prompts_per_step=2, responses_per_prompt=2, max_tokens=4)
    small = model_config(shape, num_hidden_layers=2)
    needs, model = rehearse(small, config, 8, 16, gpu), AutoModelForCausalLM.from_config(small)
    assert needs.parameters == sum(weight.numel() for weight in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    assert needs.staged == needs.parameters + head * ("tied" in shape)
    assert needs.policy == 4 * needs.parameters == needs.moments / 2
    assert needs.reference == needs.policy if not gpu or "tied" in shape else needs.reference < needs.policy
    without = rehearse(small, replace(config, loss="dr_grpo", beta=0.0), 8, 16, gpu)
    assert without.reference == 0 and without.peak <= needs.peak - needs.reference


def test_the_estimate_for_cuda_is_near_what_a_prototype_took():
    """On an H100, where layers were compiled: a whole update of 20 x 632 tokens, of a Llama of 1.1B parameters."""
    model = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    config = Config(prompts_per_step=20, responses_per_prompt=1, max_tokens=512)
    whole = rehearse(model, config, 120, 20 * 632, gpu=True)
    assert whole.peak == pytest.approx(36 * GIB, rel=0.1)
    less = rehearse(model, replace(config, activation_memory_budget=0.5), 120, 20 * 632, gpu=True)
    assert less.activations < 0.6 * whole.activations and less.policy == whole.policy


@pytest.fixture
def weightless(make_model, tmp_path) -> Path:
    """A folder with a model's config and tokenizer."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def shown(main, gsm8k, weightless, monkeypatch):
    """What --plan prints for a machine with so much memory, in GiB."""

    def show(*arguments, host: float = 64.0, gpus: int = 0, each: float = 80.0) -> SimpleNamespace:
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr(plan, "memory", lambda device: int((host if device == "cpu" else each) * GIB))
        done = main("--task", "gsm8k", "--data", gsm8k, "--model", weightless, "--plan", *arguments)
        assert done.code == 0 and not done.err and max(map(len, done.out.splitlines()[:-1])) <= 120
        return done.out

    return show


def test_a_config_and_a_tokenizer_are_enough_and_nothing_is_written(shown, main, weightless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = shown("--max-tokens", 64)
    assert re.search(r"^\d{2,3},\d{3} parameters \(llama\)", out) and out.endswith("It fits.\n")
    assert "--train-device cpu --search-devices cpu" in out
    held = {what: amount for amount, what in re.findall(r"([\d.]+ [GM]iB)  (.*)", out)}
    assert held["policy, fp32"] == held["gradients, fp32"] and held["engine: the process"] == "1.00 GiB"
    assert {path.name for path in tmp_path.iterdir()} == {"weightless"}
    done = main("--model", weightless, "--max-tokens", 64)
    assert done.code == 2 and "it must be a folder with weights" in done.err


def test_the_embedded_model_is_not_trained_for_it(main, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = main("--plan")
    assert done.code == 0 and done.out.startswith("100,416 parameters") and not list(tmp_path.iterdir())


def test_what_it_says_to_change_fits_indeed(shown):
    arguments = ["--max-tokens", 128, "--buffer-gib", 0.1]
    tokens = int(advised(shown(*arguments, host=3.25), "micro-batch-tokens"))
    assert 8000 < tokens < 16384
    assert shown(*arguments, "--micro-batch-tokens", tokens, host=3.25).endswith("It fits.\n")
    assert ": too much" in shown(*arguments, "--micro-batch-tokens", tokens + tokens // 5, host=3.25)


def advised(out: str, flag: str) -> str:
    """The value that a plan advises for a flag, for it does not fit."""
    return re.search(rf"It does not fit: .*--{flag} ([\d.]*\d)", out)[1]


@pytest.fixture
def trainer_of_8_gib(monkeypatch):
    """4 GiB of it activations, for 16,384 tokens."""

    def rehearsed(model, config, prompt, tokens, gpu, end_token):
        return Needs(tokens, True, 2**28, GIB, GIB // 2, 3 * GIB // 2, tokens * GIB // 4096, staged=2**28, cached=2**14)

    monkeypatch.setattr(plan, "rehearse", rehearsed)


def test_several_gpus(shown, trainer_of_8_gib):
    out = shown("--max-tokens", 512, gpus=4, each=12.0)
    assert "--train-device cuda:0 --search-devices cuda:1 cuda:2 cuda:3" in out and out.endswith("It fits.\n")
    assert re.search(r"\n +10\.50 GiB  in all, of 12\.00 GiB\ncuda:1,2,3 +0\.50 GiB  engine: weights, bf16\n", out)
    tokens = int(7.3 * GIB) // 2**15
    longest = int(re.search(r"of up to ([\d,]+): up to", out)[1]) + 512
    assert f" 7.30 GiB  engine: keys and values of {tokens:,} tokens, {tokens // longest} of the longest" in out


def test_one_gpu_does_both(shown, trainer_of_8_gib):
    both = ["--gpu-memory-utilization", 0.5, "--max-tokens", 128]
    assert shown(*both, gpus=1, each=24.0).endswith("It fits.\n")
    assert shown(*both, gpus=1, each=22.5).endswith("It fits, if the estimate for cuda:0 is right to 0.75 GiB.\n")
    tight = shown(*both, gpus=1, each=20.0)
    assert "cuda:0 lacks 0.50 GiB: give --micro-batch-tokens" in tight
    for flag in ("micro-batch-tokens", "gpu-memory-utilization"):
        assert "\nIt fits, if" in shown(*both, f"--{flag}", advised(tight, flag), gpus=1, each=20.0)
    none = shown("--gpu-memory-utilization", 0.1, gpus=1, each=20.0)
    share = re.search(r"an engine on cuda:0 has no room for a response: --gpu-memory-utilization ([\d.]+),", none)[1]
    assert "\nIt fits" in shown("--gpu-memory-utilization", share, gpus=1, each=20.0)


def test_the_host_may_lack_memory_for_the_buffer(shown, trainer_of_8_gib):
    arguments = ["--max-tokens", 128, "--capacity", 100_000]
    tight = shown(*arguments, gpus=2, host=5.0)
    assert advised(tight, "buffer-gib") == "1.5"
    assert shown(*arguments, "--buffer-gib", 1.5, gpus=2, host=5.0).endswith("It fits.\n")


def test_a_group_that_is_too_large_is_to_be_smaller(shown, trainer_of_8_gib):
    tight = shown("--max-tokens", 512, gpus=2, each=8.0)
    tokens = advised(tight, "micro-batch-tokens")
    assert int(tokens) == 1.5 * 4096
    arguments = ["--max-tokens", 512, "--micro-batch-tokens", tokens]
    for flag in ("responses-per-prompt", "max-tokens"):
        value = advised(tight, flag)
        assert "\nIt fits" in shown(*arguments, f"--{flag}", value, gpus=2, each=8.0)
        assert ": too much" in shown(*arguments, f"--{flag}", int(value) + 1, gpus=2, each=8.0)
    assert "give --responses-per-prompt 11 or --max-tokens" in shown(*arguments, gpus=2, each=8.0)
    assert shown(*arguments, gpus=2, each=7.0).endswith(" or --optimizer adamw_8bit.\n")
    assert shown(*arguments, gpus=2, each=6.4).endswith(" GiB: a smaller --model is needed.\n")


def test_bf16_weights_and_moments_of_8_bits_take_less(main, gsm8k, weightless):
    def held(optimizer: str) -> dict[str, float]:
        done = main("--task", "gsm8k", "--data", gsm8k, "--model", weightless, "--plan", "--optimizer", optimizer)
        return {what: float(amount) for amount, what in re.findall(r"([\d.]+) MiB  (.*)", done.out)}

    fp32, bf16, bits8 = (held(name) for name in OPTIMIZERS)
    assert 2 * bf16["policy, bf16"] == pytest.approx(fp32["policy, fp32"], abs=0.1)
    assert bf16["gradients, bf16"] == bf16["policy, bf16"] == bf16["reference, bf16"]
    assert bf16["AdamW's moments, bf16"] == pytest.approx(fp32["AdamW's moments, fp32"] / 2, abs=0.1)
    assert bits8["AdamW's moments, 8 bits"] == pytest.approx(bf16["AdamW's moments, bf16"] / 2, rel=0.03, abs=0.1)


def test_models_that_judge_are_counted(main, tldr, tldr_models):
    policy, judge = tldr_models
    done = main(
        "--task", "tldr", "--data", tldr, "--model", policy, "--reward-model", judge, "--gold-reward-model", judge,
        "--plan",
    )  # fmt: skip
    weights = 4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(policy).parameters())
    held = float(re.search(r"([\d.]+) MiB  models that judge, fp32", done.out)[1])
    assert 1.5 < held * 2**20 / weights < 3  # two with a small head, and the policy as it was


def test_what_cannot_be_planned_is_said_in_a_line(main, gsm8k, weightless):
    data = ["--task", "gsm8k", "--data", gsm8k, "--plan", "--model"]
    assert "it must be a Hugging Face folder" in main(*data, weightless / "nowhere").err
    AutoConfig.for_model("bloom", hidden_size=64, n_layer=1, n_head=2).save_pretrained(weightless)
    for done in (main(*data, weightless), main(*data, weightless, "--train-device", "cuda:7")):
        assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("tba: ")
    done = main(*data, weightless)
    assert "no update could be made from its config (BloomForCausalLM does not support" in done.err
