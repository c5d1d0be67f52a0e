"""The rules that settings must keep: the limits beside the fields in config.py, and what one allows of another."""

import dataclasses
import importlib.util
import inspect
import math
import operator
import sys
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le

from buffer import EVICTION, REPLAY
from config import Config, OneOf
from loss import OBJECTIVES
from run.devices import on_cluster
from tasks import import_file

BOUNDS = {Ge: ("at least", operator.ge), Gt: ("above", operator.gt), Le: ("at most", operator.le)}


def limits(settings: type[Config]) -> dict[str, dict[type, Any]]:
    """By field, the marks in its annotation, by their type: a field that a task gives another default keeps them."""
    marks: dict[str, dict[type, Any]] = {field.name: {} for field in dataclasses.fields(settings)}
    for each in reversed(settings.__mro__):
        for name, annotation in inspect.get_annotations(each, eval_str=True).items():
            if name in marks:
                marks[name] |= {type(mark): mark for mark in getattr(annotation, "__metadata__", ())}
    return marks


def give_way(config: Config, given: set[str]) -> Config:
    """The settings, where a default that hangs on a setting which the user gave, and cannot stand beside it, gives way.

    Args:
        config: the task's defaults with what the user gave.
        given: names of the fields that the user gave, which stay as they are; if they contradict each other or a
            default that hangs on none of them, `check` refuses them.
    """
    changed = set(given)

    def way(hangs_on: set[str], gives: bool, **values) -> None:
        nonlocal config
        if gives and changed & hangs_on:
            values = {name: value for name, value in values.items() if name not in given}
            config = dataclasses.replace(config, **values)
            changed.update(values)

    if config.loss in OBJECTIVES:
        way({"seed_data"}, config.reads_behaviour, loss="tb")
        way({"loss"}, not config.objective.has_gamma, gamma=1.0, gamma_steps=0, gamma_final=1.0)
    way({"beta"}, not config.beta and not given & {"beta_final", "beta_steps"}, beta_schedule="constant")
    way({"beta_steps"}, not config.beta_steps, beta_schedule="constant")
    way({"beta_schedule"}, config.beta_schedule == "constant", beta_steps=0, beta_final=0.0)
    way({"beta", "beta_final"}, not config.has_reference, reference_reset=0, gamma=1.0, gamma_steps=0, gamma_final=1.0)
    way({"lora_rank"}, config.lora_rank > 0, reference_reset=0)
    way({"gamma_steps"}, not config.gamma_steps, gamma_final=1.0)
    way({"lr_decay"}, not config.lr_decay and config.lr_schedule == "wsd", lr_schedule="constant")
    way({"lr_schedule"}, config.lr_schedule != "wsd", lr_decay=0)
    more = max(config.search_responses, config.responses_per_prompt)
    way({"responses_per_prompt"}, True, search_responses=more)
    way({"max_tokens"}, True, min_tokens=min(config.min_tokens, max(0, config.max_tokens)))
    return config


def check(config: Config) -> None:
    """Refuse settings that cannot be.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    def refuse(name: str, allowed: str) -> None:
        raise ValueError(f"{name} is {getattr(config, name)!r}: it must be {allowed}")

    for name, marks in limits(type(config)).items():
        value = getattr(config, name)
        given = [(*BOUNDS[kind], *dataclasses.astuple(marks[kind])) for kind in BOUNDS if kind in marks]
        if given and not (abs(value) <= sys.float_info.max and all(holds(value, limit) for _, holds, limit in given)):
            allowed = " and ".join(f"{words} {limit}" for words, _, limit in given)
            if Le not in marks:
                allowed = f"a finite number {allowed}" if Gt in marks else f"{allowed} and finite"
            refuse(name, allowed)
        if OneOf in marks and value not in marks[OneOf]:
            refuse(name, f"one of {', '.join(marks[OneOf])}")
    register_own(config)
    if config.search_responses < config.responses_per_prompt:
        refuse("search_responses", f"at least responses_per_prompt, {config.responses_per_prompt}")
    annealed = config.beta_schedule != "constant"
    if annealed != (config.beta_steps > 0):
        refuse("beta_steps", "above 0 with beta_schedule linear or cosine, and 0 with constant")
    if not annealed and config.beta_final:
        refuse("beta_final", "0 with beta_schedule constant")
    if (config.lr_schedule == "wsd") != (config.lr_decay > 0):
        refuse("lr_decay", "above 0 with lr_schedule wsd, and 0 with others")
    if not config.objective.has_gamma and (config.gamma != 1 or config.gamma_steps):
        refuse("gamma", f"1, and gamma_steps 0, with loss {config.loss}")
    if not config.has_reference:
        for name, unset in (("reference_reset", 0), ("gamma", 1), ("gamma_steps", 0)):
            if getattr(config, name) != unset:
                refuse(name, f"{unset} with beta 0, where there is no reference")
    if config.gamma_final != 1 and not config.gamma_steps:
        refuse("gamma_final", "1 with gamma_steps 0")
    low_high = config.search_temperatures
    if low_high and not (len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < math.inf):
        refuse("search_temperatures", "two numbers above 0, the lower first")
    if config.min_tokens > config.max_tokens:
        refuse("min_tokens", f"at most max_tokens, {config.max_tokens}")
    if config.seed_data and config.reads_behaviour:
        reads = f"{config.loss}, which reads the policy that wrote a response (or give --no-importance-ratio)"
        refuse("seed_data", f"left out with loss {reads}")
    if config.seed_data and config.strict:
        refuse("seed_data", "left out with strict, where each update has responses of the very policy")
    if config.strict and config.prime:
        refuse("prime", "0 with strict, which searches before each update")
    for name in ("beta", "beta_final") if annealed else ("beta",):
        if config.objective.needs_beta and not getattr(config, name):
            refuse(name, f"above 0 with loss {config.loss}")
    searching, training = config.search_devices or ("",), config.train_devices or ("",)
    placed = {"train_devices": training, "search_devices": searching, "judge_devices": config.judge_devices}
    for name, device in ((name, device) for name, devices in placed.items() for device in devices):
        kind, _, index = device.partition(":")
        try:
            remote = name != "train_devices" and on_cluster(device)
        except ValueError as error:
            refuse(name, str(error))
        words = ("cpu",) if name == "judge_devices" else ("auto", "cpu")
        if not (remote or device in words or (kind == "cuda" and index.isdecimal())):
            refuse(name, f"{', '.join(words)}, or cuda with a number, as in cuda:1")
        if remote and not importlib.util.find_spec("ray"):
            raise ValueError(f"{name} is {device!r}, and ray is not installed: pip install ray")
        if remote and remote[1:] != (1, 1) and name == "judge_devices":
            refuse(name, "ray:1 or ray:cpu:1 on a cluster, given once for each model")
        if remote and config.strict and name == "search_devices":
            refuse(name, "without ray:... with --strict: engines on a cluster load weights when they can")
    for name in ("train_devices", "search_devices"):
        others = [device for device in placed[name] if device != "cpu"]
        if len(set(others)) < len(others):
            refuse(name, "devices that differ")
    ranks = len(config.train_devices)
    if len({device.partition(":")[0] for device in config.train_devices}) > 1:
        refuse("train_devices", "of one kind")
    if config.prompts_per_step < ranks:
        refuse("prompts_per_step", f"at least {ranks}, one for each of train_devices")
    if config.optimizer == "adamw_8bit" and ranks > 1:
        refuse("optimizer", "adamw or adamw_bf16 with several train_devices: blocks of 8 bits cannot be sharded")
    if not config.model:
        refuse("model", "a Hugging Face folder or hub id")
    if config.optimizer != "adamw" and not importlib.util.find_spec("torchao"):
        refuse("optimizer", "adamw, or torchao must be installed: pip install torchao")
    if config.lora_alpha and not config.lora_rank:
        refuse("lora_alpha", "0 without lora_rank")
    if config.lora_rank:
        if config.optimizer != "adamw":
            refuse("optimizer", "adamw with lora_rank: an adapter's moments are small")
        if config.reference_reset:
            refuse("reference_reset", "0 with lora_rank, where the reference is the model without its adapter")
        if not importlib.util.find_spec("peft"):
            refuse("lora_rank", "0, or peft must be installed: pip install peft")
    for package in ("tensorboard", "wandb"):
        if getattr(config, package) and not importlib.util.find_spec(package):
            raise ValueError(f"{package} is not installed: pip install {package}, or leave --{package} out")
    if config.resume not in ("", "auto", config.out):
        refuse("out", f"left out with --resume, which goes on in {config.resume}")
    out = Path(config.out)
    if config.out and out.exists() and not (config.resume and is_run_folder(config.out)):
        metrics = out / "metrics.jsonl"
        never_began = metrics.is_file() and not metrics.stat().st_size
        if not out.is_dir() or ({path.name for path in out.iterdir()} - {"lock"} and not never_began):
            refuse("out", "a new or empty folder (or go on with that run: --resume)")


def register_own(config: Config) -> None:
    """Import what settings give as FILE.py:NAME."""
    for name, known in (("loss", OBJECTIVES), ("evict", EVICTION), ("replay", REPLAY)):
        register(name, getattr(config, name), known)


def register(field: str, value: str, known: dict[str, Any]) -> None:
    """Add the function that a setting gives as FILE.py:NAME to those that are known by name.

    Raises:
        ValueError: names the setting, its value and what is wrong, in one line.
    """
    if value in known:
        return
    path, _, name = value.rpartition(":")
    wrong = f"{field} is {value!r}: "
    if not path.endswith(".py"):
        raise ValueError(f"{wrong}it must be one of {', '.join(known)}, or FILE.py:NAME with one of your own")
    function = getattr(import_file(field, value), name, None)
    if not callable(function):
        raise ValueError(f"{wrong}{path} has no function {name!r}")
    if known is OBJECTIVES and not hasattr(function, "needs_beta"):
        raise ValueError(f"{wrong}it must be decorated with @loss.objective")
    known[value] = function


def is_run_folder(out: str) -> bool:
    """Whether a run has begun in that folder, so that --resume goes on with it."""
    return bool(out) and (Path(out) / "config.json").is_file()
