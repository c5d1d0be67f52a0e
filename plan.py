"""The plan: what a run takes of each device's memory, and whether it fits; rehearsal.py has what the trainer takes."""

import logging
import math
from collections.abc import Iterator

import numpy as np
import psutil
import torch
import transformers
from torch._subclasses import FakeTensorMode

from buffer import Trajectory
from engine import CPU_CACHE, MAX_IN_FLIGHT
from models import Frozen, load_settings
from optimizer import weights_dtype
from rehearsal import EIGHT_BITS, Needs, largest, rehearse
from run import Run

GIB = 2**30
PROCESS = GIB  # Python with torch and vLLM; measured: 0.7 GiB where the trainer is, 1.05 GiB where an engine is
CUDA_TRAINER = 2 * GIB  # a guess: context, kernels, what the allocator cannot use
CUDA_ENGINE = 3 * GIB  # a guess: context, kernels, captured graphs, activations


def memory(device: str) -> int:
    """Bytes: all that a GPU has, or what the host has available."""
    if device == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.get_device_properties(device).total_memory


def shown(count: float) -> str:
    """Bytes, for the eye.

    >>> shown(3 * 2**20), shown(5.25 * 2**30)
    ('3.0 MiB', '5.25 GiB')
    """
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{1024 * count / GIB:.1f} MiB"


class Plan:
    """What a run takes.

    Args:
        run: that is not begun; its devices are this machine's.

    Raises:
        ValueError: the model is one that cannot be trained here.
    """

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.model, _ = load_settings(run.model, "model")
        self.prompt = max(len(each.tokens) for each in run.prompts)
        self.gpu = run.train_device != "cpu"  # whether one trains
        self.kind, self.width = ("fp32", 4) if "cpu" in run.search_devices else ("bf16", 2)  # of the engines' weights
        try:
            self.needs = self.trainer(self.config.micro_batch_tokens)
            self.group = largest(self.config, self.prompt, self.needs.share)
            if self.needs.tokens < self.group:  # which is not cut
                self.needs = self.trainer(self.group)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"model is {run.model!r}: no update could be made from its config ({reason})") from error
        self.rows = list(self._rows())

    def trainer(self, tokens: int) -> Needs:
        """What the trainer takes where a forward pass has so many tokens."""
        logging.disable()  # torch complains at length of what it cannot compile
        try:
            return rehearse(self.model, self.config, self.prompt, tokens, self.gpu, self.run.tokenizer.eos_token_id)
        finally:
            logging.disable(logging.NOTSET)

    def cache(self, device: str, share: float = 0.0) -> tuple[int, int]:
        """An engine's keys and values, in bytes and in tokens; with its share of a GPU's memory, or another."""
        if device == "cpu":
            return CPU_CACHE, CPU_CACHE // (4 * self.needs.cached)
        room = (share or self.run.engine_memory[device]) * memory(device) - 2 * self.needs.staged - CUDA_ENGINE
        return max(0, int(room)), max(0, int(room)) // (2 * self.needs.cached)

    def _rows(self) -> Iterator[tuple[str, str, float]]:
        """(device, what takes its memory, bytes); "cpu" is the host."""
        run, config, needs, train = self.run, self.config, self.needs, self.run.train_device
        weights = self.width * needs.staged
        kind = {4: "fp32", 2: "bf16"}[weights_dtype(config.optimizer).itemsize]
        yield train, f"policy, {kind}", needs.policy
        if config.has_reference:
            dtypes = "its linear layers in bf16" if self.gpu and kind == "fp32" else kind
            yield train, f"reference, {dtypes}", needs.reference
        yield train, f"AdamW's moments, {'8 bits' if config.optimizer == 'adamw_8bit' else kind}", needs.moments
        yield train, f"gradients, {kind}", needs.policy
        yield train, f"activations of a forward pass of {needs.tokens:,} tokens", needs.activations
        yield train if self.gpu and self.width == 2 else "cpu", f"weights for the engines, {self.kind}", weights
        if self.gpu:
            yield train, "CUDA's own (a guess)", CUDA_TRAINER
        for device in run.search_devices:
            cpu = device == "cpu"
            yield device, f"engine: weights, {self.kind}", weights
            yield device, "engine: " + ("the process" if cpu else "its own (a guess)"), PROCESS if cpu else CUDA_ENGINE
            room, tokens = self.cache(device)
            at_once = min(tokens // run.longest, MAX_IN_FLIGHT[device.split(":")[0]])
            text = f"{at_once:,} of the longest responses at a time"
            yield device, f"engine: keys and values of {tokens:,} tokens, {text}", room
        if judges := judging(run):
            yield run.search_devices[-1], f"models that judge, {self.kind}", self.width * judges
        yield "cpu", "copy of policy and moments, while a checkpoint is written", needs.policy + needs.moments
        longest = np.zeros(config.max_tokens, np.int32)
        response = Trajectory(longest, True, 0.0, 0, None if config.on_policy else longest).nbytes
        most = min(config.buffer_responses, config.capacity * len(run.prompts)) * response
        self.buffer = min(config.buffer_gib * GIB, most)
        yield "cpu", "buffer, when it is full", self.buffer
        yield "cpu", "the process", PROCESS

    def show(self) -> None:
        """Print it."""
        run, config = self.run, self.config
        print(f"{self.needs.parameters:,} parameters ({self.model.model_type}), from the config: no weights are read")
        responses = f"{config.responses_per_prompt} responses of up to {config.max_tokens:,} tokens"
        prompts = f"{config.prompts_per_step} prompts of up to {self.prompt:,}"
        print(f"an update has {responses} to each of {prompts}: up to {self.group:,} a prompt")
        print(f"the split: --train-device {run.train_device} --search-devices {' '.join(run.search_devices)}")
        print(f"\n{'device':<18} {'memory':>10}  what" + self.gpu * " (on GPUs an estimate, which none has confirmed)")
        alike: dict[tuple, list[str]] = {}
        for device in dict.fromkeys([run.train_device, *run.search_devices, "cpu"]):
            held = tuple((what, taken) for where, what, taken in self.rows if where == device)
            alike.setdefault((held, memory(device)), []).append(device)
        amiss: list[str] = []
        close = ""
        for (held, there), devices in alike.items():
            name = ",".join([devices[0], *(device.removeprefix("cuda:") for device in devices[1:])])
            for what, taken in held:
                print(f"{name:<18} {shown(taken):>10}  {what}")
                name = ""
            lack = sum(taken for _, taken in held) - there
            print(f"{'':<18} {shown(lack + there):>10}  in all, of {shown(there)}" + ": too much" * (lack > 0))
            amiss += self.mend(devices[0], lack)
            if self.gpu and devices[0] == run.train_device and -lack < self.needs.peak / 10:
                close = f", if the estimate for {devices[0]} is right to {shown(-lack)}"
        print("\n" + (f"It does not fit: {'; '.join(amiss)}." if amiss else f"It fits{close}."))

    def mend(self, device: str, lack: float) -> Iterator[str]:
        """What is amiss on a device that lacks so many bytes, and what to change."""
        run, needs, there = self.run, self.needs, memory(device)
        ways: list[str] = []
        free = needed = 0.0
        if device in run.search_devices and device != "cpu":
            least = 2 * needs.staged + CUDA_ENGINE
            free = (max(run.engine_memory[device] * there, least) - lack) / there  # share of it left to the engine
            needed = (least + 2 * needs.cached * run.longest) / there
        if device in run.search_devices and self.cache(device)[1] < run.longest:
            more = f"--gpu-memory-utilization {math.ceil(100 * needed) / 100}, " * (0 < needed < min(free, 0.95))
            yield f"an engine on {device} has no room for a response: {more}a lower --max-tokens or a smaller --model"
        if lack <= 0:
            return
        if device == run.train_device:
            ways += self.smaller(lack)
        if free and needed < (share := math.floor(100 * free) / 100):
            ways.append(f"--gpu-memory-utilization {share}")
        if device == "cpu" and (buffer := math.floor(10 * (self.buffer - lack) / GIB) / 10) > 0:
            ways.append(f"--buffer-gib {buffer}")
        saved = (
            needs.policy + (1 - EIGHT_BITS / 4) * needs.moments
        )  # half of weights and gradients, most of the moments
        if device == run.train_device and self.config.optimizer == "adamw" and lack <= saved:
            ways.append("--optimizer adamw_8bit")
        change = f"give {' or '.join(ways)}" if ways else "a smaller --model is needed"
        yield f"{device} lacks {shown(lack)}: {change}"

    def smaller(self, lack: float) -> Iterator[str]:
        """Settings with which the trainer takes so many bytes less, if fewer activations are enough."""
        needs = self.needs
        tokens, limit = needs.tokens, needs.peak - lack
        K, longest = self.config.responses_per_prompt, self.config.max_tokens
        few = self.trainer(max(1, tokens // 8))
        if few.tokens >= tokens or few.peak > limit:
            return
        # Nothing grows more slowly than the tokens, and masks grow with their square: this is at most what fits.
        tokens = few.tokens + int((tokens - few.tokens) * (limit - few.peak) / (needs.peak - few.peak))
        while tokens > few.tokens and self.trainer(tokens).peak > limit:
            tokens -= tokens // 20 + 1
        flags = [f"--micro-batch-tokens {tokens}"] if tokens < self.config.micro_batch_tokens else []
        if tokens < self.group:
            if needs.share:
                fewer, shorter = (tokens - self.prompt) // longest, (tokens - self.prompt) // K
            else:
                fewer, shorter = tokens // (self.prompt + longest), tokens // K - self.prompt
            most = {"responses-per-prompt": fewer, "max-tokens": shorter}
            flags.append(" or ".join(f"--{name} {count}" for name, count in most.items() if count > 1))
        if all(flags):
            yield " with ".join(flags)


def judging(run: Run) -> int:
    """How many weights the task's frozen models have."""
    values = [value if isinstance(value, list) else [value] for value in vars(run.task).values()]
    models = {id(each): each for held in values for each in held if isinstance(each, Frozen)}
    with FakeTensorMode():
        made = [getattr(transformers, each.kind).from_config(each.settings) for each in models.values()]
    return sum(weight.numel() for model in made for weight in model.parameters())
