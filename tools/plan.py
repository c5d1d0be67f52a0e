"""The plan: what a run takes of each device's memory, from the model's config alone, and whether it fits.

What training takes is counted, not modelled: the trainer makes an update on fake tensors, which have shapes and no
contents, and `Live` counts their bytes. For the CPU, tests compare it with updates that are measured. For CUDA it is an
upper bound, because fake CPU tensors in bf16 stand in for CUDA's. It overestimates what layers keep for the backward
pass: they are compiled on CUDA, and not here (a Llama of 1.1B parameters took 36 GiB on an H100, and 47 GiB where its
layers were not compiled: 49 GiB are planned); the keys and values of grouped queries, repeated for each head; and the
mask of rows that share a prompt, which is dense. Where several devices train, each has its shard of what is sharded.
"""

import contextlib
import functools
import itertools
import logging
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from buffer import Group, Response
from config import Config
from rewards.judges import Judge, load_config_and_tokenizer
from run.devices import on_cluster
from search.engine import EngineSettings
from tasks import Task
from train.cuda import cast_linears
from train.model import decoder_layers
from train.optimizer import make_optimizer, weights_dtype
from train.packing import packed_length
from train.trainer import Trainer

GIB = 2**30
EIGHT_BITS = 1 + 4 / 256  # bytes of a moment: one, and its share of an fp32 scale for 256
PROCESS = GIB  # Python with torch and vLLM; measured: 0.7 GiB where the trainer is, 1.05 GiB where an engine is
CUDA_TRAINER = 2 * GIB  # a guess: context, kernels, what the allocator cannot use
CUDA_ENGINE = 3 * GIB  # a guess: context, kernels, captured graphs, activations


if TYPE_CHECKING:
    from run.setup import Setup

log = logging.getLogger("tba")


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and their peak; tensors that share a storage count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        try:
            result = operation(*args, **(kwargs or {}))
        except DataDependentOutputException:  # a number is read, such as a truth value: any finite one will do
            return 1.0
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)


class CudaAttention(TorchFunctionMode):
    """Attention as on CUDA, as far as memory goes: kernels hold no scores, and those of flex attention no mask."""

    def __init__(self, flex: bool):
        super().__init__()
        self.flex = flex

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        mask = None if self.flex else kwargs.get("attn_mask")
        return function(query, key, value, attn_mask=mask, is_causal=mask is None)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a trainer takes, in bytes or, where it says so, a number."""

    tokens: int  # number, in a forward pass
    group: int  # number of tokens of the largest group
    parameters: int  # number, tied ones once
    policy: int
    trained: int  # of that, all or an adapter; gradients take as much
    reference: int
    moments: int
    peak: int  # of an update, all these included
    staged: int  # number of weights in an engine, tied ones twice
    cached: int  # number of keys and values of a token
    layers: int = 1  # number
    gathered: int = 0  # number of weights that a rank has whole at a time: three layers', and those beside the layers

    @property
    def activations(self) -> int:  # the peak beyond what stays
        return self.peak - self.policy - self.trained - self.reference - self.moments


def estimate(model: PreTrainedConfig, config: Config, prompt: int, cuda: bool, end_token: int | None = None) -> Needs:
    """What the trainer of a model with this config takes on the CPU, or at most on CUDA, where the longest prompt has
    `prompt` tokens."""
    with FakeTensorMode(), Live() as live, contextlib.ExitStack() as stack:
        trainer = Trainer(model, config, "cpu", end_token)
        policy, reference = trainer.policy, trainer.reference
        weights = [weight for weight in policy.parameters() if weight.requires_grad]
        if config.optimizer != "adamw":  # torchao refuses fake tensors; torch's own takes as much but for 8 bits
            trainer.optimizer = make_optimizer("adamw", weights)
        if cuda:
            cast_linears(reference, torch.bfloat16)
            trainer.autocast = torch.autocast("cpu", torch.bfloat16)
            with contextlib.suppress(ValueError):  # GPT-2, for one, does not have it
                policy.set_attn_implementation("flex_attention")
            trainer.attention = policy.config._attn_implementation
            stack.enter_context(CudaAttention(flex=trainer.attention == "flex_attention"))
        share = trainer.shares_prompts(full_passes(config, prompt, share=True)[0])
        trainer.attention = "sdpa" if cuda else trainer.attention
        trainer.shares_prompts = lambda _: share  # type: ignore
        groups, fit, largest = full_passes(config, prompt, share)
        trainer.micro_batch_tokens = fit * packed_length(groups[0], share)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        trainer.optimizer.step()  # from here on there are moments
        trainer.optimizer.zero_grad()
        live.peak = 0
        trainer.update(groups, lr=1.0, beta=1.0)
        peak = live.peak
        if cuda and config.has_reference:  # it has a stream of its own, whose memory the update cannot use
            before = live.peak = live.now
            alone = trainer.lora.without_adapter(policy) if trainer.lora else contextlib.nullcontext()
            with torch.no_grad(), alone:
                _, first = next(trainer.micro_batches(groups))
                trainer.logprobs(reference, first, config.temperature, config.min_tokens)
            peak += live.peak - before
        states = trainer.optimizer.state.values()
        moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
        saved = int(moments * (1 - EIGHT_BITS / 2)) if config.optimizer == "adamw_8bit" else 0
        layers_of, size = decoder_layers(policy), lambda layer: sum(weight.numel() for weight in layer.parameters())
        row = torch.zeros(1, 8, dtype=torch.long)
        with torch.no_grad(), trainer.autocast:
            layers = reference.base_model(input_ids=row, use_cache=True).past_key_values.layers
        return Needs(
            tokens=trainer.micro_batch_tokens,
            group=largest,
            parameters=trainer.parameters,
            policy=sum(weight.nbytes for weight in policy.parameters()),
            trained=sum(weight.nbytes for weight in weights),
            reference=sum(weight.nbytes for weight in reference.parameters()) if reference is not policy else 0,
            moments=moments - saved,
            peak=peak - saved,
            staged=sum(math.prod(shape) for _, shape in trainer.layout),
            layers=len(layers_of),
            gathered=trainer.parameters - sum(map(size, layers_of)) + 3 * max(map(size, layers_of)),
            cached=sum(layer.keys.numel() + layer.values.numel() for layer in layers) // row.numel(),
        )


def full_passes(config: Config, prompt: int, share: bool) -> tuple[list[Group], int, int]:
    """Groups of an update whose forward passes are full, two passes (the second has the gradients of the first beside
    it) unless one has all B groups; the number of groups in a pass; and the tokens of the largest group."""
    K, B, longest = config.responses_per_prompt, config.prompts_per_step, config.max_tokens
    largest = K * longest + (prompt if share else K * prompt)
    tokens = max(config.micro_batch_tokens, largest)  # a group is not cut
    fit = min(B, -(-tokens // largest))
    each = min(largest, tokens // fit)
    start = max(1, prompt * each // largest)
    length = max(1, (each - start) // K if share else each // K - start)
    tokens_T, logprobs_T = np.zeros(length, np.int32), np.zeros(length, np.float32)
    groups = []
    for i in range(fit if fit == B else 2 * fit):
        responses = [Response(tokens_T, True, 0, 0.0, "", logprobs_T, logprobs_T) for _ in range(K)]
        groups.append(Group(i, np.zeros(start, np.int32), responses))
    return groups, fit, largest


def of_trainer(needs: Needs, config: Config, cuda: bool, ranks: int) -> dict[str, float]:
    """What the trainer takes of each of so many devices, in bytes, by what it is."""
    kind = {4: "fp32", 2: "bf16"}[weights_dtype(config.optimizer).itemsize]
    shard = f", a shard of {ranks}" * (ranks > 1)
    frozen_kind = "its linear layers in bf16" if cuda and kind == "fp32" else kind
    rows = {f"policy, {kind}{shard}": needs.policy / ranks}
    if config.lora_rank:
        rows = {f"policy and reference, {frozen_kind}{shard}": (needs.policy - needs.trained) / ranks}
        rows[f"adapter of rank {config.lora_rank}, {kind}{shard}"] = needs.trained / ranks
    if needs.reference:
        rows[f"reference, {frozen_kind}{shard}"] = needs.reference / ranks
    rows[f"AdamW's moments, {'8 bits' if config.optimizer == 'adamw_8bit' else kind}{shard}"] = needs.moments / ranks
    rows[f"gradients, {kind}{shard}"] = needs.trained / ranks
    if ranks > 1:
        rows["layers whose weights are gathered"] = (2 if cuda else 4) * needs.gathered
    stored = min(1, config.activation_memory_budget + 2 / needs.layers)  # the rest is recomputed, a layer at a time
    rows[f"activations of a pass of {needs.tokens:,} tokens{', at most' * cuda}"] = stored * needs.activations
    return rows | ({"CUDA's own (a guess)": CUDA_TRAINER} if cuda else {})


def split(needs: Needs, config: Config, gpus: int, each: float, search: bool = True) -> tuple[int, str]:
    """How many of several GPUs, of so many bytes each, train, and why: as few as the trainer fits on, then more until
    search need not pause for them. An engine is taken to generate as many tokens/s as a GPU trains on: a prototype's
    did, 34,300 and 34,200 on an H100 with a Llama of 1.1B, and both go with the model's size."""
    most = 1 if config.optimizer == "adamw_8bit" else min(gpus - search, config.prompts_per_step)
    takes = [sum(of_trainer(needs, config, True, ranks).values()) + 2 * needs.staged for ranks in range(1, most + 1)]
    fewest = next((ranks for ranks, count in enumerate(takes, 1) if count <= each), most)
    count = next((n for n in range(fewest, most) if gpus - n <= config.search_ahead * n), most) if search else fewest
    if count > fewest:
        return count, f"with fewer, search would pause for training (--search-ahead {config.search_ahead:g})"
    return count, f"training takes {shown(takes[count - 1])} of each one's {shown(each)}, at most"


def memory(device: str) -> float:
    """Bytes: all that a GPU has, or what the host has available; inf where that is not known, on a cluster."""
    if on_cluster(device):
        return float("inf")
    gpu = device != "cpu"
    return torch.cuda.get_device_properties(device).total_memory if gpu else psutil.virtual_memory().available


def shown(count: float) -> str:
    """Bytes as "3.0 MiB" or "5.25 GiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{1024 * count / GIB:.1f} MiB"


class Plan:
    """What a run takes of each device's memory. Raises a ValueError where the model cannot be trained here."""

    def __init__(self, setup: "Setup"):
        self.setup, self.config = setup, setup.config
        self.model, _ = load_config_and_tokenizer(setup.model, "model")
        self.prompt = max(len(prompt.tokens) for prompt in setup.prompts)
        self.cuda = setup.train_devices[0] != "cpu"
        logging.disable()  # torch complains at length of what it cannot do with fake tensors
        try:
            self.needs = estimate(self.model, self.config, self.prompt, self.cuda, setup.tokenizer.eos_token_id)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"model is {setup.model!r}: no update could be made from its config ({reason})") from error
        finally:
            logging.disable(logging.NOTSET)

    def cache(self, engine: EngineSettings) -> tuple[float, int]:
        """An engine's keys and values, in bytes and in tokens."""
        if engine.device == "cpu":
            room = engine.kv_cache_memory_bytes
            return room, room // (4 * self.needs.cached)
        count = engine.gpu_memory_utilization * memory(engine.device) - 2 * self.needs.staged - CUDA_ENGINE
        return max(0.0, count), max(0, int(count)) // (2 * self.needs.cached)

    def choose_devices(self, gpus: list[str]) -> None:
        """Let as many of these GPUs train as `split` says, and the others search where search is to be anywhere."""
        setup, anywhere = self.setup, "auto" in self.config.search_devices
        count, why = split(self.needs, self.config, len(gpus), min(map(memory, gpus)), anywhere)
        setup.train_devices = gpus[:count]
        others = [device for device in setup.search_devices if device not in gpus]
        setup.search_devices = others + gpus[count:] * anywhere
        log.info(f"{count} of {len(gpus)} GPUs train{', the others search' * anywhere}: {why}")

    @functools.cached_property
    def judges(self) -> list[tuple[int, str]]:
        """(number of weights, device) of each of the task's models that score."""
        return list(zip(judge_weights(self.setup.task), itertools.cycle(self.setup.judge_devices), strict=False))

    @property
    def buffer(self) -> float:
        """Bytes of the buffer when it is full."""
        longest = np.zeros(self.config.max_tokens, np.int32)
        response = Response(longest, True, logprobs=longest if self.config.reads_behaviour else None)
        return min(self.config.buffer_gib * GIB, self.config.capacity * len(self.setup.prompts) * response.nbytes)

    def rows(self) -> Iterator[tuple[str, str, float]]:
        """(device, what takes its memory, bytes); "cpu" is the host."""
        setup, config, needs, ranks = self.setup, self.config, self.needs, self.setup.train_devices
        engine_kind, width = ("fp32", 4) if "cpu" in " ".join(setup.search_devices) else ("bf16", 2)
        for device in ranks:
            for what, count in of_trainer(needs, config, self.cuda, len(ranks)).items():
                yield device, what, count
        weights = width * needs.staged
        on_gpu = self.cuda and width == 2 and not setup.remote
        yield ranks[0] if on_gpu else "cpu", f"weights for the engines, {engine_kind}", weights
        for engine in setup.engines:
            device, (count, tokens) = engine.device, self.cache(engine)
            fit = f"{min(tokens // engine.max_model_len, engine.slots):,} of the longest responses at a time"
            yield device, f"engine: weights, {engine_kind}", weights
            own = ("engine: the process", PROCESS) if device == "cpu" else ("engine: its own (a guess)", CUDA_ENGINE)
            yield device, *own
            yield device, f"engine: keys and values of {tokens:,} tokens, {fit}", count
        for device, (engine, _, _) in setup.remote.items():
            cpu, room = engine.device == "cpu", engine.kv_cache_memory_bytes
            yield device, f"each engine: weights, {engine_kind}", weights
            yield device, *(("each engine: the process", PROCESS) if cpu else ("its own (a guess)", CUDA_ENGINE))
            yield device, *(("each engine: keys and values", room) if cpu else ("keys and values: what is left", 0))
        if setup.remote:
            yield "cpu", "weights in Ray's object store, of two syncs", 2 * weights
        for device in dict.fromkeys(device for _, device in self.judges):
            kind, width = ("fp32", 4) if "cpu" in device else ("bf16", 2)
            counts = [width * count for count, where in self.judges if where == device]
            if on_cluster(device):
                yield device, f"the largest model that scores, {kind}", max(counts)
            else:
                yield device, f"models that score, {kind}", sum(counts)
        if config.lora_rank:
            yield "cpu", "merged weights, fp32, while the policy is saved at the end", 4 * needs.staged
        else:
            lasts = "from the first checkpoint on" if self.cuda else "while a checkpoint is written"
            yield "cpu", f"copy of policy and moments, {lasts}", needs.policy + needs.moments
        yield "cpu", "buffer, when it is full", self.buffer
        of_ranks = f"the processes of {len(ranks)} ranks, each with the whole model while it loads"
        several = len(ranks) > 1
        yield "cpu", of_ranks if several else "the process", len(ranks) * (PROCESS + several * needs.policy)

    def show(self) -> None:
        """Print it."""
        setup, config, needs = self.setup, self.config, self.needs
        print(f"{needs.parameters:,} parameters ({self.model.model_type}), from the config: no weights are read")
        responses = f"{config.responses_per_prompt} responses of up to {config.max_tokens:,} tokens"
        prompts = f"{config.prompts_per_step} prompts of up to {self.prompt:,}"
        print(f"an update has {responses} to each of {prompts}: up to {needs.group:,} a prompt")
        train, search = " ".join(setup.train_devices), " ".join(setup.search_devices)
        print(f"the split: --train-devices {train} --search-devices {search}")
        print(f"\n{'device':<18} {'memory':>10}  what")
        alike: dict[tuple, list[str]] = {}  # devices that hold the same are shown once
        for device in dict.fromkeys([*setup.train_devices, *setup.search_devices, *setup.judge_devices, "cpu"]):
            held = tuple((what, count) for where, what, count in self.rows() if where == device)
            alike.setdefault((held, memory(device)), []).append(device)
        problems: list[str] = []
        for (held, there), devices in alike.items():
            name = ",".join([devices[0], *(device.removeprefix("cuda:") for device in devices[1:])])
            total = sum(count for _, count in held)
            for i, (what, count) in enumerate(held):
                print(f"{'' if i else name:<18} {shown(count):>10}  {what}")
            cluster = f"for each; the cluster has {setup.cluster['GPU']:.0f} GPUs, {setup.cluster['CPU']:.0f} CPU cores"
            of = cluster if there == float("inf") else f"of {shown(there)}"
            print(f"{'':<18} {shown(total):>10}  in all, {of}" + ": too much" * (total > there))
            problems += self.problems(devices[0], total - there)
        problems += self.waits()
        verdict = f"It {'may' if self.cuda else 'does'} not fit: " if problems else "It fits"
        print(f"\n{verdict}{'; '.join(problems)}.")

    def waits(self) -> Iterator[str]:
        """What a run waits for where the cluster has not enough for its models that score and its least engines."""
        needed, words = Counter[str](), [*self.setup.remote, *(device for _, device in self.judges)]
        for kind, least, _ in filter(None, map(on_cluster, words)):
            needed.update({"GPU": least * (kind == "cuda"), "CPU": least})  # an engine on a GPU has a CPU core too
        asked = " ".join(word for word in words if on_cluster(word))
        for kind, count in needed.items():
            if count > (there := self.setup.cluster[kind]):
                yield f"the run waits until the cluster has {count} {kind}s for {asked}, and it has {there:.0f}"

    def problems(self, device: str, lack: float) -> Iterator[str]:
        """What is wrong on a device that lacks so many bytes, and what helps."""
        config, needs, trains = self.config, self.needs, device in self.setup.train_devices
        engines = [engine for engine in self.setup.engines if engine.device == device]
        if any(self.cache(engine)[1] < engine.max_model_len for engine in engines):
            more = "a higher --gpu-memory-utilization, " * (device != "cpu")
            yield f"an engine on {device} cannot hold a response: {more}a lower --max-tokens or a smaller --model helps"
        if lack <= 0:
            return
        fewer = "--micro-batch-tokens" if needs.tokens > needs.group else "--responses-per-prompt"
        eight_bits = needs.policy + (1 - EIGHT_BITS / 4) * needs.moments  # half of weights and gradients, most moments
        adapter = needs.trained + needs.moments + needs.reference  # what an adapter takes itself is little
        full, ranks = trains and not config.lora_rank and config.optimizer == "adamw", len(self.setup.train_devices)
        shards = (needs.policy + needs.trained + needs.moments + needs.reference) / ranks  # more ranks take less of
        helps = {  # bytes that it gives back, at most
            f"a lower {fewer}": trains * needs.activations,
            "--optimizer adamw_8bit": full * (ranks == 1) * eight_bits,
            "--lora-rank 32": full * (not config.reference_reset) * adapter / ranks,
            "more --train-devices": trains * self.cuda * (torch.cuda.device_count() > ranks) * shards,
            "a lower --gpu-memory-utilization": self.cache(engines[0])[0] if engines and device != "cpu" else 0,
            "a lower --buffer-gib": self.buffer * (device == "cpu"),
            "a smaller --model": float("inf"),
        }
        ways = " or ".join(way for way, count in helps.items() if count > lack)
        yield f"{device} lacks {'at most ' * (trains and self.cuda)}{shown(lack)}: {ways} helps"


def judge_weights(task: Task) -> list[int]:
    """How many weights each of the task's frozen models has."""
    values = [value if isinstance(value, list) else [value] for value in vars(task).values()]
    judges = {id(each): each for several in values for each in several if isinstance(each, Judge)}
    with FakeTensorMode():
        models = [getattr(transformers, judge.auto_class).from_config(judge.config) for judge in judges.values()]
    return [sum(weight.numel() for weight in model.parameters()) for model in models]
