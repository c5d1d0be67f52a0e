"""Bad input gets one line that names the field, its value and what is allowed, before anything is loaded."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from typing import Annotated

import pytest
from annotated_types import Ge, Gt, Le

from buffer import EVICTION, REPLAY
from config import MAY_CHANGE, Config
from loss import OBJECTIVES
from run.check import check, limits
from run.cli import parse
from run.devices import devices
from run.setup import sequences_per_engine
from tasks import import_file

LIMITS = limits(Config)
BAD = [
    *((name, marks[Ge].ge - 1) for name, marks in LIMITS.items() if Ge in marks),
    *((name, marks[Le].le + 1) for name, marks in LIMITS.items() if Le in marks),
    *((name, value) for name, marks in LIMITS.items() if Gt in marks for value in (0.0, -1.0, "nan", "inf")),
    ("on_policy_prob", "nan"),
    ("beta_final", "inf"),
    ("gamma_final", 2.0),  # without gamma_steps
    ("min_tokens", 99),  # above max_tokens
    ("search_temperatures", 1.0),
    ("near_duplicates", "alike"),
    ("beta_final", 0.1),  # without a beta_schedule
    ("beta_steps", 9),
    ("beta_schedule", "linear"),  # without beta_steps
    ("beta_schedule", "quadratic"),
    ("beta", 0.0),  # by which tb divides
    ("beta", "nan"),
    ("lr_schedule", "cosine"),
    ("lr_schedule", "wsd"),  # without lr_decay
    ("lr_decay", 5),  # without wsd
    ("evict", "random"),
    ("replay", "newest"),
    ("loss", "ppo"),
    ("optimizer", "sgd"),
    ("train_devices", "gpu"),
    ("train_devices", "cuda"),
    ("train_devices", "cuda:0 cuda:0"),
    ("train_devices", "cpu cuda:0"),
    ("search_devices", "cuda:x"),
    ("model", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError) as refusal:
        parse([f"--{name.replace('_', '-')}={value}"])
    message = str(refusal.value)
    assert "\n" not in message and "must be" in message
    related = {"beta_schedule": "beta_steps", "lr_schedule": "lr_decay"}
    assert message.startswith((f"{name} is ", f"{related.get(name, name)} is "))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "chess"], "countdown, gsm8k, math, redteam, tldr"),
        (["--task"], "--task"),
        (["--search-devices", "cuda:1", "cuda:1"], "search_devices is .* devices that differ"),
        (["--steps", "many"], "--steps"),
        (["--search-temperatures", "0.5,2"], r"--search-temperatures: .* \['0.5,2'\]$"),
        (["--search-temperatures", "2", "1"], "search_temperatures is .* the lower first"),
        (["--loss", "grpo", "--gamma", "2"], "gamma is 2.0: it must be 1"),
        (["--task", "redteam", "--victim-replies", "0"], "victim_replies is 0: it must be at least 1"),
        (["--task", "redteam", "--victim-top-p", "1.5"], "victim_top_p is 1.5: .* at most 1"),
        (["--task", "math", "--grade-seconds", "0"], "grade_seconds is 0.0"),
        (["--strict", "--seed-data", "x"], "seed_data is 'x': it must be left out with strict"),
        (["--stepz", "3"], "--stepz"),
        (["--numbers", "7"], "--numbers"),
        (["--task", "gsm8k", "--numbers", "4"], "--numbers"),
        (["--search-responses", "4"], "search_responses is 4: it must be at least responses_per_prompt, 16"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_read_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named) as refusal:
        parse(arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("task", "flags", "gave_way"),
    [
        ("gsm8k", ["--beta-schedule", "constant"], {"beta_steps": 0, "beta_final": 0.0}),
        ("gsm8k", ["--beta_schedule=constant"], {"beta_steps": 0, "beta_final": 0.0}),
        ("gsm8k", ["--beta-steps", "0"], {"beta_schedule": "constant", "beta_final": 0.0}),
        ("gsm8k", ["--lr-schedule", "constant"], {"lr_decay": 0}),  # the warm-up is every schedule's
        ("gsm8k", ["--lr-schedule", "linear"], {"lr_decay": 0}),
        ("gsm8k", ["--lr-decay", "0"], {"lr_schedule": "constant"}),
        ("gsm8k", ["--responses-per-prompt", "32"], {"search_responses": 32}),
        ("gsm8k", ["--responses-per-prompt", "8"], {}),
        (
            "gsm8k",
            ["--loss", "dr_grpo", "--beta", "0"],
            {"beta_schedule": "constant", "beta_steps": 0, "beta_final": 0.0},
        ),
        ("math", ["--loss", "dr_grpo", "--beta", "0"], {"reference_reset": 0}),
        ("math", ["--lora-rank", "32"], {"reference_reset": 0}),
        ("redteam", ["--loss", "rloo"], {"gamma": 1.0, "gamma_steps": 0}),
        ("redteam", ["--gamma-steps", "0"], {}),
        ("redteam", ["--max-tokens", "3"], {"min_tokens": 3}),
        ("tldr", ["--beta-schedule", "cosine"], {}),
        ("countdown", ["--seed-data", "x"], {"loss": "tb"}),  # nobody knows who wrote a demonstration
        ("countdown", ["--seed-data", "x", "--no-importance-ratio"], {"importance_ratio": False}),
    ],
)
def test_a_default_that_hangs_on_what_a_flag_changed_gives_way(task, flags, gave_way):
    defaults = dataclasses.asdict(parse(["--task", task]))
    found = dataclasses.asdict(parse(["--task", task, *flags]))
    names = {flag.lstrip("-").partition("=")[0].replace("-", "_") for flag in flags}
    assert {name: found[name] for name in found if found[name] != defaults[name] and name not in names} == gave_way


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--beta-schedule", "constant", "--beta-steps", "9"], "beta_steps is 9: it must be above 0"),
        (["--beta-schedule", "constant", "--beta-final", "0.1"], "beta_final is 0.1: it must be 0 with"),
        (["--lr-schedule", "constant", "--lr-decay", "9"], "lr_decay is 9"),
        (["--responses-per-prompt", "32", "--search-responses", "24"], "search_responses is 24: it must be at least"),
        (["--beta", "0"], "beta is 0.0: it must be above 0 with loss tb"),
    ],
)
def test_what_the_user_gave_never_gives_way(flags, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(["--task", "gsm8k", *flags])


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("paid for")
    with pytest.raises(ValueError, match="out is"):
        parse(["--out", str(tmp_path)])


def test_resume_takes_the_runs_settings(tmp_path):
    settings = dataclasses.asdict(parse(["--steps", "7", "--search-devices", "cpu"]))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    resumed = parse(["--resume", str(tmp_path), "--steps", "9"])
    assert (resumed.steps, resumed.search_devices, resumed.out) == (9, ("cpu",), str(tmp_path))
    again = ["--steps", "7", "--search-devices", "cpu"]  # the same command
    resumed = parse(["--resume", "auto", "--out", str(tmp_path), *again])
    assert dataclasses.replace(resumed, out="", resume="") == parse(again)
    for flags, complaint in (
        (["--lr", "1"], "lr was 0.0003 in .*, and is 1.0 now: it cannot change .* --model .*/model"),
        (["--numbers", "4"], "numbers was 3 in"),
        (["--strict"], "strict was False in"),
    ):
        with pytest.raises(ValueError, match=complaint):
            parse(["--resume", str(tmp_path), *flags])
    with pytest.raises(ValueError, match=r"does not fit .task was 'countdown', and is 'math' now"):
        parse(["--resume", str(tmp_path), "--task", "math"])
    with pytest.raises(ValueError, match="out is 'elsewhere'"):
        parse(["--resume", str(tmp_path), "--out", "elsewhere"])
    (tmp_path / "config.json").write_text(json.dumps(settings | {"unknown": 1}))
    with pytest.raises(ValueError, match=r"does not fit .*unknown"):
        parse(["--resume", str(tmp_path)])


def test_resume_auto_goes_on_with_the_newest_run_of_the_task_or_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (parse(["--resume", "auto"]).out, parse(["--resume", "auto", "--out", "new"]).out) == ("", "new")
    settings = dataclasses.asdict(parse([]))
    for name in ("countdown-20260101-000000", "countdown-20260102-000000", "gsm8k-20270101-000000", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(settings))
    assert parse(["--resume", "auto"]).out == "runs/countdown-20260102-000000"
    assert parse(["--resume", "auto", "--out", "runs/mine"]).out == "runs/mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="out is 'other'"):
        parse(["--resume", "auto", "--out", "other"])
    with pytest.raises(ValueError, match=r"resume is 'other': .*other/config.json does not exist"):
        parse(["--resume", "other"])


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("steps", "0", "steps is 0: it must be at least 1 and finite"),
        ("on_policy_prob", "1.5", "on_policy_prob is 1.5: it must be at least 0 and at most 1"),
        ("lr", "0", "lr is 0.0: it must be a finite number above 0"),
        ("max_num_seqs", "-1", "max_num_seqs is -1: it must be at least 0 and finite"),
        ("lr_schedule", "cosine", "lr_schedule is 'cosine': it must be one of constant, linear, wsd"),
        (
            "evict",
            "random",
            "evict is 'random': it must be one of oldest, lowest_reward, or FILE.py:NAME with one of your own",
        ),
    ],
)
def test_the_sentence_names_the_field_its_value_and_what_is_allowed(name, value, sentence):
    with pytest.raises(ValueError) as refusal:
        parse([f"--{name.replace('_', '-')}={value}"])
    assert str(refusal.value) == sentence


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """A task's own."""

    model: str = "some"
    steps: int = 256
    on_policy_prob: Annotated[float, Le(0.5)] = 0.25
    colours: Annotated[int, Ge(2), Le(9), MAY_CHANGE] = 3
    sharpness: Annotated[float, Gt(0), Le(1)] = 1.0


def test_a_task_has_limits_of_its_own_and_keeps_those_of_the_fields_it_sets():
    check(Settings())
    for changed, allowed in (
        ({"steps": 0}, "steps is 0: it must be at least 1 and finite"),
        ({"colours": 1}, "colours is 1: it must be at least 2 and at most 9"),
        ({"colours": 10}, "colours is 10: it must be at least 2 and at most 9"),
        ({"sharpness": 0.0}, "sharpness is 0.0: it must be above 0 and at most 1"),
        ({"sharpness": math.nan}, "sharpness is nan: it must be above 0 and at most 1"),
        ({"on_policy_prob": 0.6}, "on_policy_prob is 0.6: it must be at least 0 and at most 0.5"),
    ):
        with pytest.raises(ValueError) as refusal:
            check(Settings(**changed))
        assert str(refusal.value) == allowed
    may_change = {name for name, marks in limits(Settings).items() if MAY_CHANGE in marks.values()}
    assert {"steps", "colours", "max_num_seqs"} < may_change and not {"lr", "seed", "sharpness"} & may_change


def test_sequences_in_flight_are_about_two_updates_of_responses():
    batch = {"prompts_per_step": 2, "responses_per_prompt": 16, "search_responses": 24}
    assert sequences_per_engine(Config(**batch), 1, 256) == 64
    assert sequences_per_engine(Config(**batch, search_ahead=1.5), 1, 256) == 48
    assert sequences_per_engine(Config(**batch), 8, 256) == 24  # all responses to a prompt
    assert sequences_per_engine(Config(**batch), 1, 8) == 8
    assert sequences_per_engine(Config(**batch, max_num_seqs=7), 1, 256) == 7


OWN = """
import dataclasses

import loss

executed = globals().get("executed", 0) + 1


@loss.objective(needs_beta=True, reads_behaviour=True)
def mine(batch, beta):
    return batch


def undecorated(batch, beta):
    return batch


def worst(rewards, k, rng):
    return rewards.argsort()[:k]


@dataclasses.dataclass
class Point:
    x: "int" = 0


number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of the user's own, `own.py` in this folder; what it registers is forgotten in the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    before = [(known, dict(known)) for known in (OBJECTIVES, EVICTION, REPLAY)]
    yield tmp_path / "own.py"
    for known, functions in before:
        known.clear()
        known.update(functions)


def test_functions_of_ones_own_are_named_by_their_file(own, tmp_path):
    config = parse(["--loss", f"{own}:mine", "--replay", f"{own}:worst", "--evict", f"{own}:undecorated"])
    module = import_file("task", str(own))
    assert config.objective is module.mine and REPLAY[config.replay] is module.worst
    assert config.reads_behaviour and config.objective.needs_beta and not config.objective.has_gamma
    assert module.executed == 1 and sys.modules[module.__name__] is module and module.Point(2).x == 2
    assert import_file("loss", "own.py:mine") is module
    with pytest.raises(ValueError, match=r"beta is 0.0: it must be above 0 with loss .*own.py:mine"):
        parse(["--loss", "own.py:mine", "--beta", "0"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "own.py").write_text("def mine(reward): return 2")
    assert EVICTION[parse(["--evict", "other/own.py:mine"]).evict](None) == 2  # another file of that name


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--loss", "nowhere.py:f", "loss is 'nowhere.py:f': there is no such file"),
        ("--replay", "own.py:best", "replay is 'own.py:best': own.py has no function 'best'"),
        ("--evict", "own.py:number", "evict is 'own.py:number': own.py has no function 'number'"),
        ("--loss", "own.py:undecorated", "loss is 'own.py:undecorated': it must be decorated with @loss.objective"),
        ("--loss", "bad.py:f", "loss is 'bad.py:f': it cannot be imported (TypeError: one line, and another)"),
        ("--loss", "syntax.py:f", "loss is 'syntax.py:f': it cannot be imported (SyntaxError: "),
        ("--loss", "own.py", "loss is 'own.py': it must be one of tb, "),
        ("--loss", "own:mine", "loss is 'own:mine': it must be one of tb, "),
    ],
)
def test_a_file_without_such_a_function_is_refused(flag, value, complaint, own, tmp_path):
    (tmp_path / "bad.py").write_text("raise TypeError('one line,\\nand another')")
    (tmp_path / "syntax.py").write_text("def")
    modules = set(sys.modules)
    with pytest.raises(ValueError) as refusal:
        parse([flag, value])
    message = str(refusal.value)
    assert message.startswith(complaint) and "\n" not in message
    assert not [name for name in set(sys.modules) - modules if name.startswith(("bad", "syntax"))]


def test_a_flag_beats_the_task_which_beats_the_field():
    assert parse([]).prompts_per_step == 16
    assert parse(["--task", "gsm8k"]).responses_per_prompt == 20
    assert parse(["--task", "gsm8k", "--steps", "7"]).steps == 7
    assert parse(["--steps", "7", "--task=gsm8k"]).lr_decay == 500
    assert parse(["--numbers", "4"]).numbers == 4
    assert parse(["--search-devices", "cuda:1", "cuda:2"]).search_devices == ("cuda:1", "cuda:2")


def test_the_command_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "tba.py", "--out", str(tmp_path / "out"), "--temperature", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "tba: temperature is -1.0: it must be a finite number above 0\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "gsm8k", "--model", "no/such", "--data", "nowhere"], "tba: model is 'no/such'"),
        (["--train-devices", "cuda:63"], "tba: train_devices has 'cuda:63'"),
        (["--model", "tests"], "tba: model is 'tests'"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(arguments, complaint, tmp_path, main, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = main("--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert done.err.startswith(complaint) and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_help_shows_every_field_with_the_tasks_default():
    done = subprocess.run(
        [sys.executable, "tba.py", "--task", "gsm8k", "--help"], capture_output=True, text=True, check=True
    )
    for text in ("--on-policy-prob", "probability that a prompt of a batch", "realtreetune/rho-1b-sft-GSM8K"):
        assert text in done.stdout


def test_a_run_cut_short_still_reaches_its_learning_rate():
    config = parse(["--task", "gsm8k", "--steps", "100", "--lr-warmup", "0"])  # the task's decay is longer than that
    assert config.lr_at(0) == config.lr and 0 < config.lr_at(98) < 0.02 * config.lr and config.lr_at(99) == 0


@pytest.mark.parametrize("schedule", [["linear"], ["wsd", "--lr-decay", "7"]])
def test_the_learning_rate_rises_and_ends_at_0_on_the_last_update(schedule):
    config = parse(["--steps", "20", "--lr-warmup", "4", "--lr-schedule", *schedule])
    rates = [config.lr_at(step) for step in range(20)]
    assert rates[:4] == pytest.approx([config.lr * part for part in (0.25, 0.5, 0.75, 1)])
    assert max(rates) == config.lr and rates[-1] == 0 < rates[-2]
    assert all(a > b for a, b in itertools.pairwise(rates[13:]))
    assert parse(["--steps", "20", "--lr-warmup", "30", "--lr-schedule", *schedule]).lr_at(19) == 0


def test_strict_is_on_policy_unless_flags_say_otherwise():
    config = parse(["--strict"])
    assert (config.strict, config.sync_every, config.on_policy_prob, config.prime) == (True, 1, 1.0, 0)
    config = parse(["--strict", "--on-policy-prob", "0.5", "--sync-every", "4"])
    assert (config.strict, config.sync_every, config.on_policy_prob) == (True, 4, 0.5)
    with pytest.raises(ValueError, match="prime is 9: it must be 0 with strict"):
        parse(["--strict", "--prime", "9"])
    assert not parse([]).strict and parse([]).sync_every == 2


def test_search_returns_log_probabilities_only_where_they_are_read():
    reading = {name for name in OBJECTIVES if parse(["--loss", name]).reads_behaviour}
    assert reading == {"tb_tapered", "tb_prime", "rloo", "grpo", "dr_grpo", "cispo"}
    assert not parse(["--loss", "tb_prime", "--no-importance-ratio"]).reads_behaviour


def test_an_objective_that_does_not_divide_by_beta_may_do_without():
    config = parse(["--loss", "dr_grpo", "--beta", "0"])
    assert config.beta == 0 and not config.has_reference and parse([]).has_reference
    annealed = ["--beta-schedule", "cosine", "--beta-steps", "9"]
    config = parse(["--loss", "grpo", *annealed])
    assert config.beta_final == 0 and config.has_reference
    for flag, value in (("reference_reset", "50"), ("gamma", "2"), ("gamma_steps", "9")):
        with pytest.raises(ValueError, match=rf"^{flag} is {value}[.0]*: it must be [01] with beta 0"):
            parse(["--loss", "tb_prime", "--beta", "0", f"--{flag.replace('_', '-')}", value])
    with pytest.raises(ValueError, match=r"beta_final is 0\.0: it must be above 0 with loss tb"):
        parse(annealed)


def test_of_several_gpus_the_first_trains_and_the_others_search(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert devices(["auto"], ["auto"]) == (["cuda:0"], ["cuda:1", "cuda:2", "cuda:3"])
    assert devices(["cuda:2", "cuda:0"], ["auto"]) == (["cuda:2", "cuda:0"], ["cuda:1", "cuda:3"])
    assert devices(["auto"], ["cuda:0", "cuda:1"]) == (["cuda:2"], ["cuda:0", "cuda:1"])
    assert devices(["cuda:0"], ["cuda:0", "cuda:1"]) == (["cuda:0"], ["cuda:0", "cuda:1"])
    with pytest.raises(ValueError, match="search_devices has 'cuda:4'"):
        devices(["auto"], ["cuda:4"])
    with pytest.raises(ValueError, match="search_devices is 'cpu'"):
        devices(["auto"], ["cpu"])


def test_one_gpu_does_both_and_none_leaves_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert devices(["auto"], ["auto"]) == (["cuda:0"], ["cuda:0"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices(["auto"], ["auto"]) == (["cpu"], ["cpu"])
    assert devices(["auto"], ["cpu", "cpu"]) == (["cpu"], ["cpu", "cpu"])
