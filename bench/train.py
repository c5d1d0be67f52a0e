"""How fast is an update, what does sharing prompts gain, and what does search in the same process cost it?

    python -m bench.train                       a random Llama of 4M (on a GPU 1.1B): about 8 minutes on 2 cores
    python -m bench.train --parts lengths       one of its parts: beside, lengths, utilization, memory, kernel
    python -m bench.train --size 30M            another size (bench/lengths_task.py)
    python -m bench.train --json                prints, last, all figures as one JSON object

beside_search       Countdown (on a GPU the lengths of GSM8K): the time of the same updates by a trainer in a process of
                    its own, over the time in this process, which searches too; search goes on in both
packed_*            one update (a group of 20 responses; 16 of 16 where it says Countdown): the time as padded rows over
                    the time with shared prompts, for prompts and responses of given lengths; chosen_*: over the time in
                    the form that the trainer chooses
utilization         6 x parameters x tokens over the time of an update on 20 x (120 + 512) tokens, as a share of what a
                    large matrix product reaches; reference scores are known. On a GPU with each --optimizer
peak_gib_*          at 1.1B with a vocabulary of 150,000, what an update of those tokens takes beside weights, reference
                    and optimiser state, by --activation-memory-budget; without a GPU what tools/plan.py estimates
divisible_*         on a GPU, flex attention over a row of that many tokens, forward and backward, whose length is a
                    symbol to the compiler: its time over the time where it is told that blocks divide it
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig

from bench.lengths_task import SIZES
from bench.session import Batches, searching, session, train
from bench.table import at_least, parser, table
from buffer import Group, Response
from config import Config
from search.engine import context
from search.process import pin_thread
from tools.plan import estimate
from train.packing import Packed, pack
from train.trainer import Trainer

LENGTHS = {  # prompts a batch, responses each, prompt, mean and standard deviation of the responses, in tokens
    "gsm8k": (1, 20, 120, 200, 80),
    "tldr": (1, 20, 400, 60, 25),
    "long": (1, 20, 120, 512, 0),
    "even": (1, 20, 400, 128, 0),
    "countdown": (16, 16, 13, 9, 1),
}
PARTS = "beside", "lengths", "utilization", "memory", "kernel"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit") if DEVICE == "cuda" else ("adamw",)
BUDGETS = 1.0, 0.8, 0.4
WARM = 3  # updates that are not counted


def llama(size: str, **settings) -> LlamaConfig:
    """Of that size."""
    return LlamaConfig(**SIZES[size] | settings, max_position_embeddings=2048, eos_token_id=0, pad_token_id=0)


def groups(B: int, K: int, prompt: int, mean: int, spread: int, vocabulary: int, seed: int = 0) -> list[Group]:
    """Of random tokens, with the reference's log-probabilities."""
    rng = np.random.default_rng(seed)

    def response() -> Response:
        length = int(np.clip(rng.normal(mean, spread), 4, 2 * mean))
        tokens = rng.integers(1, vocabulary, length, dtype=np.int32)
        return Response(tokens, True, reward=rng.random(), ref_logprobs=np.full(length, -5.0, np.float32))

    return [
        Group(i, rng.integers(1, vocabulary, prompt, dtype=np.int32), [response() for _ in range(K)]) for i in range(B)
    ]


def seconds(trainer: Trainer, batch: list[Group], share: bool | None = None) -> float:
    """Of an update, with shared prompts, without, or as the trainer chooses."""
    if share is not None:
        vars(trainer)["shares_prompts"] = lambda _: share  # in front of the class's
    try:
        wait()
        began = time.perf_counter()
        trainer.update(batch, beta=0.05, lr=0.0)
        wait()
        return time.perf_counter() - began
    finally:
        vars(trainer).pop("shares_prompts", None)


def wait() -> None:
    """Until the GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_flops() -> float:
    """A second, of a large matrix product."""
    size, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (1536, torch.float32)
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    times = []
    for _ in range(8):
        wait()
        began = time.perf_counter()
        a @ a
        wait()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def lengths(size: str, repeats: int) -> Iterator[dict[str, float]]:
    """Packed against padded rows."""
    trainer = Trainer(llama(size), Config(), DEVICE)
    batches = {name: groups(*shape, SIZES[size]["vocab_size"]) for name, shape in LENGTHS.items()}
    for batch in batches.values():
        for share in (True, False):
            for _ in range(WARM if DEVICE == "cuda" else 1):
                seconds(trainer, batch, share)
    for _ in range(repeats):
        figures = {}
        for name, batch in batches.items():
            taken = {share: seconds(trainer, batch, share) for share in (True, False)}
            figures[f"packed_{name}"] = taken[False] / taken[True]
            figures[f"chosen_{name}"] = taken[False] / taken[trainer.shares_prompts(batch)]
        yield figures


def utilization(size: str, repeats: int) -> Iterator[dict[str, float]]:
    """Of an update."""
    batch = groups(*LENGTHS["long"], SIZES[size]["vocab_size"])
    found: list[dict[str, float]] = [{} for _ in range(repeats)]
    for optimizer in OPTIMIZERS:
        trainer = Trainer(llama(size), Config(optimizer=optimizer), DEVICE)
        for _ in range(WARM):
            tokens = trainer.update(batch, beta=0.05, lr=0.0).result()["tokens"]
        for figures in found:
            flops = 6 * trainer.parameters * tokens / seconds(trainer, batch)
            figures[f"utilization_{optimizer}"] = flops / peak_flops()
        del trainer
    yield from found


def memory() -> dict[str, float]:
    """GiB of an update at 1.1B with a vocabulary of 150,000."""
    model = llama("1.1B", vocab_size=150_000)
    B, K, prompt, length, _ = LENGTHS["long"]
    if DEVICE == "cpu":
        config = Config(prompts_per_step=B, responses_per_prompt=K, max_tokens=length)
        needs = estimate(model, config, prompt, cuda=True)
        return {"peak_gib_at_most": (needs.policy + needs.activations) / 2**30}
    figures = {}
    for budget in BUDGETS:
        torch._dynamo.reset()  # what was compiled for another budget
        trainer = Trainer(model, Config(activation_memory_budget=budget), DEVICE)
        batch = groups(*LENGTHS["long"], 150_000)
        for _ in range(WARM):
            trainer.update(batch, beta=0.05, lr=0.0)
        wait()
        held = torch.cuda.memory_allocated()  # gradients are gone
        torch.cuda.reset_peak_memory_stats()
        for response in batch[0].responses:
            response.ref_logprobs = None  # is computed beside
        trainer.update(batch, beta=0.05, lr=0.0)
        wait()
        figures[f"peak_gib_{budget}"] = (torch.cuda.max_memory_allocated() - held) / 2**30
        del trainer
    return figures


def kernel(repeats: int) -> Iterator[dict[str, float]]:
    """Whether flex attention gains where no load of its is masked: as it may be, for rows of whole blocks."""
    compiled = torch.compile(flex_attention, dynamic=True)
    rows = [pack(groups(n, 20, 120, 200, 80, 1000), torch.device("cuda"), flex=True) for n in (1, 2, 4, 8)]

    def taken(row: Packed, divisible: bool) -> float:
        shape, options = (1, 16, row.tokens.shape[1], 64), {"IS_DIVISIBLE": True} if divisible else {}
        query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3))
        times = []
        for _ in range(WARM + 5):
            wait()
            began = time.perf_counter()
            compiled(query, key, value, block_mask=row.mask, kernel_options=options).sum().backward()
            wait()
            times.append(time.perf_counter() - began)
        return min(times)

    for _ in range(repeats):
        yield {f"divisible_{row.tokens.shape[1]}": taken(row, False) / taken(row, True) for row in rows}


async def beside(repeats: int, updates: int, settings: list[str]) -> list[dict[str, float]]:
    """A trainer in this process, which searches too, against one in a process of its own."""
    found = []
    async with session(*settings) as run:
        here, there = context.Pipe()
        # Not a task's own kind of settings: the process may not find its file.
        config = Config(**{field.name: getattr(run.config, field.name) for field in dataclasses.fields(Config)})
        arguments = there, run.setup.model, config, run.setup.train_devices[0], run.setup.train_cores
        child = context.Process(target=alone, args=arguments, daemon=True)
        child.start()
        there.close()
        async with searching(run):
            await train(run, WARM)
            for _ in range(repeats):
                batches = Batches()
                with batches.recorded(run):
                    together = await train(run, updates)
                await asyncio.to_thread(here.send, (batches.batches, batches.new))
                apart = await asyncio.to_thread(here.recv)
                found.append({"beside_search": apart / together})
        here.close()  # which ends it
        child.join()
    return found


def alone(pipe, model: str, config: Config, device: str, cores: frozenset[int]) -> None:
    """The trainer's process: trains on what comes, and answers with the seconds that it took."""
    pin_thread(cores)
    trainer = Trainer(model, config, device)
    rounds = 2  # the first is not counted
    with contextlib.suppress(EOFError):
        while True:
            batches, new = pipe.recv()
            for _ in range(rounds):
                began = time.perf_counter()
                for batch, unscored in zip(batches, new, strict=True):
                    for response in unscored:
                        response.ref_logprobs = None
                    trainer.update(batch, beta=0.05, lr=1e-6)
                wait()
            rounds = 1
            pipe.send(time.perf_counter() - began)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    commands.add_argument("--size", choices=SIZES, default="1.1B" if DEVICE == "cuda" else "4M")
    commands.add_argument("--updates", type=at_least(1), default=60, help="in each repeat of beside_search")
    wanted, settings = commands.parse_known_args(arguments)
    found: list[dict[str, float]] = [{} for _ in range(wanted.repeats)]

    def add(part) -> None:
        for figures, more in zip(found, part, strict=True):
            figures |= more

    if "beside" in wanted.parts:
        like_gsm8k = ["--task", "bench/lengths_task.py", "--model", "1.1B"] if DEVICE == "cuda" else []
        add(asyncio.run(beside(wanted.repeats, wanted.updates, [*like_gsm8k, *settings])))
    if "lengths" in wanted.parts:
        add(lengths(wanted.size, wanted.repeats))
    if "utilization" in wanted.parts:
        add(utilization(wanted.size, wanted.repeats))
    if "memory" in wanted.parts:
        add([memory()] * wanted.repeats)
    if "kernel" in wanted.parts and DEVICE == "cuda":
        add(kernel(wanted.repeats))
    table(found, wanted.json)


if __name__ == "__main__":
    main()
