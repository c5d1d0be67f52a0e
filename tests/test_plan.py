"""The plan says what real updates take, and what helps where there is too little memory."""

import ctypes
import gc
import itertools
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config
from run.cli import parse
from run.setup import prepare
from tests.runs import PROJECT, forked, forkserver
from tools import plan
from tools.plan import GIB, Needs, Plan, estimate, full_passes, of_trainer, split
from train.trainer import Trainer

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
    "an adapter": (
        "llama",
        dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=4000),
        dict(responses_per_prompt=4, max_tokens=240, micro_batch_tokens=2000, lora_rank=8),
        40,
    ),
}


def model_config(shape: str, **sizes):
    architecture, own, _, _ = SHAPES[shape]
    ends = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return AutoConfig.for_model(architecture, **ends, tie_word_embeddings="tied" in shape, **own | sizes)


def settings(shape: str) -> tuple[Config, int]:
    """The run's settings, and the length of its longest prompt."""
    _, _, own, prompt = SHAPES[shape]
    return Config(prompts_per_step=4, **own), prompt


# ---- what training takes ----


def resident(which: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at most since that was reset."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(shape: str, answer) -> None:
    """Send what two updates take at their peak beside what the process took before, in a process of its own."""
    torch.set_num_threads(1)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, libc = -1, -3, ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, 0), libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back at once
    config, prompt = settings(shape)
    small = dict(n_embd=64) if "gpt2" in SHAPES[shape] else dict(hidden_size=64, intermediate_size=64)
    groups, *_ = full_passes(replace(config, micro_batch_tokens=1, max_tokens=2), 4, share=True)
    Trainer(model_config(shape, **small), config, "cpu").update(groups, lr=1e-6, beta=1.0)
    gc.collect()  # all code is loaded, all threads run
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trainer = Trainer(model_config(shape), config, "cpu")
    groups, *_ = full_passes(config, prompt, share=True)
    if not trainer.shares_prompts(groups):
        groups, *_ = full_passes(config, prompt, share=False)
    for response in itertools.chain.from_iterable(group.responses for group in groups):
        response.ref_logprobs = None  # the trainer computes them
    for _ in range(2):
        trainer.update(groups, lr=1e-6, beta=1.0)
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


@pytest.mark.parametrize("shape", SHAPES)
def test_the_planned_peak_is_the_measured_one(shape, measured):
    needs = estimate(model_config(shape), *settings(shape), cuda=False)
    print(f"{shape}: planned {needs.peak / 2**20:.0f} MiB, measured {measured[shape] / 2**20:.0f} MiB")
    assert needs.peak == pytest.approx(measured[shape], rel=0.1) and needs.peak > 300e6
    assert (needs.activations > needs.peak / 2) == (not shape.startswith("most is weights"))


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES)[:3])  # of which all weights are trained
def test_parameters_are_those_of_the_model(shape, cuda):
    config = Config(prompts_per_step=2, responses_per_prompt=2, max_tokens=4, micro_batch_tokens=16)
    small = model_config(shape, num_hidden_layers=2)
    needs, model = estimate(small, config, 8, cuda), AutoModelForCausalLM.from_config(small)
    assert needs.parameters == sum(weight.numel() for weight in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    assert needs.staged == needs.parameters + head * ("tied" in shape)
    assert needs.policy == 4 * needs.parameters == needs.moments / 2
    assert needs.reference == needs.policy if not cuda or "tied" in shape else needs.reference < needs.policy
    without = estimate(small, replace(config, loss="dr_grpo", beta=0.0), 8, cuda)
    assert without.reference == 0 and without.peak <= needs.peak - needs.reference


def test_what_is_planned_for_cuda_is_above_what_a_prototype_took_and_below_twice_that():
    """On an H100, a whole update of 20 x 632 tokens took 36 GiB with compiled layers, and 47 GiB without."""
    sizes = dict(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000
    )
    model = AutoConfig.for_model("llama", num_hidden_layers=22, **sizes)
    config = Config(prompts_per_step=20, responses_per_prompt=1, max_tokens=512)
    needs = estimate(model, config, 120, cuda=True)
    assert needs.tokens == 20 * 632 and needs.peak / 2 < 36 * GIB < needs.peak
    assert needs.peak == pytest.approx(47 * GIB, rel=0.1)


def test_for_cuda_prompts_are_shared_as_there_and_no_scores_are_counted():
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4, vocab_size=600)
    model = AutoConfig.for_model("llama", num_hidden_layers=2, **sizes)
    config = Config(prompts_per_step=4, responses_per_prompt=20, max_tokens=60)
    assert estimate(model, config, 400, cuda=True).tokens == 4 * (400 + 20 * 60)  # without padding
    rows = [replace(config, prompts_per_step=B, responses_per_prompt=1, max_tokens=8192 // B) for B in (16, 1)]
    short, long = (estimate(model, each, 16, cuda=True).activations for each in rows)
    assert long < 1.5 * short  # scores would be 4 GiB


# ---- what a run takes ----


@pytest.fixture
def weightless(make_model, tmp_path) -> Path:
    """A folder with a model's config and tokenizer."""
    folder = shutil.copytree(make_model("llama"), tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def shown(gsm8k, weightless, monkeypatch, capsys):
    """What --plan prints for a machine with so much memory, in GiB."""

    def show(*arguments, host: float = 64.0, gpus: int = 0, each: float = 80.0, **changed) -> str:
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        monkeypatch.setattr(plan, "memory", lambda device: int((host if device == "cpu" else each) * GIB))
        command = {"task": "gsm8k", "data": gsm8k, "model": weightless} | changed
        given = [part for name, value in command.items() for part in (f"--{name}", value)]
        setup = prepare(parse([*map(str, (*given, *arguments)), "--plan"]))
        capsys.readouterr()
        Plan(setup).show()
        printed, complaints = capsys.readouterr()
        assert not complaints and max(map(len, printed.splitlines()[:-1])) <= 120
        return printed

    return show


def held(printed: str) -> dict[str, float]:
    """What a plan has, in MiB."""
    units = {"G": 1024, "M": 1}
    found = re.findall(r"([\d.]+) ([GM])iB  (.*)", printed)
    return {what: float(count) * units[unit] for count, unit, what in found}


def test_a_config_and_a_tokenizer_are_enough_and_nothing_is_written(shown, weightless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = shown("--max-tokens", 64)
    assert re.search(r"^\d{2,3},\d{3} parameters \(llama\)", printed) and printed.endswith("\nIt fits.\n")
    assert "--train-devices cpu --search-devices cpu" in printed and "at most" not in printed
    takes = held(printed)
    assert takes["policy, fp32"] == takes["gradients, fp32"] and takes["engine: the process"] == 1024
    assert {path.name for path in tmp_path.iterdir()} == {"weightless"}


def test_the_embedded_model_is_not_trained_for_it(main, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = main("--plan")
    assert done.code == 0 and "\n100,416 parameters (llama)" in f"\n{done.out}" and not list(tmp_path.iterdir())


@pytest.fixture
def trainer_of_8_gib(monkeypatch):
    """4 GiB of it activations, for 16,384 tokens."""

    def needs(model, config, prompt, cuda, end_token):
        tokens, group = config.micro_batch_tokens, config.responses_per_prompt * config.max_tokens
        peak = 4 * GIB + tokens * GIB // 4096
        return Needs(tokens, group, 2**28, GIB, GIB, GIB // 2, 3 * GIB // 2, peak, staged=2**28, cached=2**14)

    monkeypatch.setattr(plan, "estimate", needs)


def test_several_gpus(shown, trainer_of_8_gib):
    printed = shown("--max-tokens", 512, "--max-num-seqs", 9, gpus=4, each=12.0)
    assert "--train-devices cuda:0 --search-devices cuda:1 cuda:2 cuda:3" in printed and printed.endswith("It fits.\n")
    assert re.search(r"\n +10\.50 GiB  in all, of 12\.00 GiB\ncuda:1,2,3 +0\.50 GiB  engine: weights, bf16\n", printed)
    tokens = int(7.3 * GIB) // 2**15
    assert f" 7.30 GiB  engine: keys and values of {tokens:,} tokens, 9 of the longest" in printed
    assert " 4.00 GiB  activations of a pass of 16,384 tokens, at most\n" in printed


@pytest.mark.parametrize(
    ("gpus", "each", "arguments", "trains"),
    [
        (4, 10.6, [], 1),
        (4, 10.4, [], 2),  # a shard of 2 takes 8.5 GiB, of 3 7.8
        (4, 8.0, [], 3),
        (8, 80.0, ["--search-ahead", 1], 4),  # search would wait for fewer
        (8, 80.0, ["--search-ahead", 3], 2),
        (8, 80.0, ["--search-ahead", 1, "--prompts-per-step", 3], 3),
        (4, 8.0, ["--optimizer", "adamw_8bit"], 1),  # cannot be sharded
        (4, 8.0, ["--train-devices", "cuda:0"], 1),
        (4, 8.0, ["--search-devices", "cuda:2", "cuda:3"], 2),  # the others
        (4, 12.0, ["--search-devices", "cuda:1", "cuda:2", "cuda:3"], 1),
    ],
)
def test_as_few_gpus_train_as_the_trainer_fits_and_as_search_need_not_wait_for(
    shown, trainer_of_8_gib, lines, gpus, each, arguments, trains
):
    printed = shown("--max-tokens", 512, *arguments, gpus=gpus, each=each)
    chosen = [line for line in lines if "GPUs train" in line]
    names = [f"cuda:{i}" for i in range(gpus)]
    train, search = " ".join(names[:trains]), " ".join(names[trains:])
    assert f"the split: --train-devices {train} --search-devices {search}\n" in printed
    assert len(chosen) == (not str(arguments[:1]).startswith("['--train") and each != 12.0)
    assert all(line.startswith(f"{trains} of ") for line in chosen)
    assert all(("search would pause" in line) == (each == 80.0) for line in chosen) or trains == 1
    shard = f", a shard of {trains}" if trains > 1 else ""
    assert f"{shown_gib(1 / trains)}  policy, fp32{shard}\n" in printed or "adamw_8bit" in arguments


LLAMAS = {
    "1.1B": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}


@pytest.mark.long
def test_the_table_of_several_gpus_is_what_is_planned():
    text = (PROJECT / "docs" / "settings.md").read_text()
    lines = text[text.index("| Llama | GPUs of |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(rows) == 5
    for model, each, *cells in rows:
        name, *flags = model.replace(", `", " ").rstrip("`").split()
        config = parse(["--task", "gsm8k", "--model", "any", *flags])
        needs = estimate(AutoConfig.for_model("llama", vocab_size=32000, **LLAMAS[name]), config, 492, cuda=True)
        room = int(each.split()[0]) * GIB
        for gpus, cell in zip(map(int, header[2:]), cells, strict=True):
            train, _ = split(needs, config, gpus, room)
            taken = sum(of_trainer(needs, config, True, train).values()) + 2 * needs.staged
            assert cell == (f"{train} + {gpus - train}" if taken <= room else "too small"), (model, gpus)


def shown_gib(count: float) -> str:
    return plan.shown(count * GIB)


def test_a_device_that_lacks_memory_has_a_line_that_says_what_helps(shown, trainer_of_8_gib):
    def problems(*arguments, **machine) -> str:
        return shown("--max-tokens", 128, *arguments, **machine).split("\n\n")[-1].removeprefix("It may not fit: ")

    helps = "a lower --micro-batch-tokens or --optimizer adamw_8bit or --lora-rank 32"
    share = ("--gpu-memory-utilization", 0.5)
    assert problems(*share, gpus=1, each=24.0) == "It fits.\n"
    assert problems(*share, gpus=1, each=20.0) == (
        f"cuda:0 lacks at most 0.50 GiB: {helps} or a lower --gpu-memory-utilization or a smaller --model helps.\n"
    )
    few = ("--micro-batch-tokens", 1024, "--optimizer", "adamw_8bit")
    helps = "a lower --responses-per-prompt or more --train-devices or a smaller --model helps"
    assert problems(*few, gpus=2, each=6.6) == f"cuda:0 lacks at most 0.15 GiB: {helps}.\n"
    assert problems("--gpu-memory-utilization", 0.1, gpus=1, each=20.0).startswith(
        "an engine on cuda:0 cannot hold a response: a higher --gpu-memory-utilization, a lower --max-tokens or a "
        "smaller --model helps"
    )
    assert problems(gpus=2, host=2.0) == "cpu lacks 1.55 GiB: a smaller --model helps.\n"
    helps = "a lower --buffer-gib or a smaller --model helps"
    assert problems("--capacity", 10**5, gpus=2, host=10.5) == f"cpu lacks 1.00 GiB: {helps}.\n"


def test_bf16_weights_and_moments_of_8_bits_take_less(shown):
    fp32, bf16, bits8 = (held(shown("--optimizer", name)) for name in ("adamw", "adamw_bf16", "adamw_8bit"))
    assert 2 * bf16["policy, bf16"] == pytest.approx(fp32["policy, fp32"], abs=0.1)
    assert bf16["gradients, bf16"] == bf16["policy, bf16"] == bf16["reference, bf16"]
    assert bf16["AdamW's moments, bf16"] == pytest.approx(fp32["AdamW's moments, fp32"] / 2, abs=0.1)
    assert bits8["AdamW's moments, 8 bits"] == pytest.approx(bf16["AdamW's moments, bf16"] / 2, rel=0.03, abs=0.1)


def test_of_an_adapter_there_are_gradients_and_moments_and_no_reference_beside_the_policy(shown):
    model, (config, prompt) = model_config("an adapter"), settings("an adapter")
    lora, full = (estimate(model, replace(config, lora_rank=rank), prompt, cuda=True) for rank in (8, 0))
    widths = 4 * (512 + 512) + 3 * (512 + 1408)  # of a layer's 7 linear layers
    assert lora.trained == 4 * 8 * 4 * widths == lora.moments / 2
    assert lora.reference == 0 and lora.policy - lora.trained == full.reference < full.policy == full.trained
    assert lora.parameters == full.parameters + lora.trained // 4 and lora.staged == full.staged
    assert lora.peak < full.peak - full.policy - full.trained - full.moments + 2 * lora.trained + lora.moments
    rows = held(shown("--lora-rank", 2, gpus=2))
    assert {"policy and reference, its linear layers in bf16", "adapter of rank 2, fp32"} <= rows.keys()
    assert not [what for what in rows if what.startswith(("reference", "copy"))]


def test_models_that_score_are_counted(shown, tldr, tldr_models):
    policy, judge = tldr_models
    judges = ("--reward-model", judge, "--gold-reward-model", judge)
    takes = held(shown(*judges, task="tldr", data=tldr, model=policy))["models that score, fp32"]
    weights = 4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(policy).parameters())
    assert 1.5 < takes * 2**20 / weights < 3  # two with a small head, and the policy as it was


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that is not there, for plans, of so many GPUs and CPU cores."""
    pytest.importorskip("ray")
    has: Counter[str] = Counter()
    monkeypatch.setattr("search.cluster.connect", lambda: has)
    return lambda gpus, cores: has.update(GPU=gpus - has["GPU"], CPU=cores - has["CPU"])


def test_all_that_is_asked_of_a_cluster_is_counted(shown, cluster, tldr, tldr_models, trainer_of_8_gib):
    policy, judge = tldr_models
    asked = "--search-devices", "cuda:1", "ray:4-64", "ray:8", "ray:cpu:2", "--judge-devices", "ray:1", "ray:cpu:1"
    models = "--reward-model", judge, "--gold-reward-model", judge, "--max-tokens", 32

    def planned(gpus: int, cores: int) -> str:
        cluster(gpus, cores)
        return shown(*models, *asked, task="tldr", data=tldr, model=policy, gpus=2)

    assert planned(14, 17).endswith("\nIt fits.\n")  # 3 models that score: the first and the last on GPUs
    words = "ray:4-64 ray:8 ray:cpu:2 ray:1 ray:cpu:1 ray:1"
    assert planned(13, 17).endswith(
        f"\nIt may not fit: the run waits until the cluster has 14 GPUs for {words}, and it has 13.\n"
    )
    assert f"the cluster has 17 CPUs for {words}, and it has 16.\n" in planned(14, 16)


def test_models_that_score_are_planned_in_the_dtype_of_their_own_device(shown, cluster, tldr, tldr_models):
    policy, judge = tldr_models
    cluster(8, 8)
    models = "--reward-model", judge, "--gold-reward-model", judge, "--max-tokens", 32
    asked = "--search-devices", "cpu", "--judge-devices", "ray:1", "cpu", "cpu"
    takes = held(shown(*models, *asked, task="tldr", data=tldr, model=policy))
    assert takes["the largest model that scores, bf16"] < takes["models that score, fp32"] / 3
    assert takes["weights for the engines, fp32"] > 0


def test_what_cannot_be_planned_is_said_in_a_line(main, gsm8k, weightless):
    data = ["--task", "gsm8k", "--data", gsm8k, "--plan", "--model"]
    assert "it must be a Hugging Face folder" in main(*data, weightless / "nowhere").err
    AutoConfig.for_model("bloom", hidden_size=64, n_layer=1, n_head=2).save_pretrained(weightless)
    for done in (main(*data, weightless), main(*data, weightless, "--train-devices", "cuda:7")):
        assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("tba: ")
    done = main(*data, weightless)
    assert "it cannot be trained here (BloomForCausalLM does not support" in done.err
