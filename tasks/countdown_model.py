"""Countdown's demonstrations, and the model that learns from them: a character-level Llama of 0.1 million parameters.

It is trained when it is first needed, and stored in the user's cache folder. The demonstrations are random expressions
over the numbers. In the last quarter of the warm-up half of them have a target that they do not reach: the model then
knows more than it shows, which is left for reinforcement learning.
"""

import atexit
import hashlib
import json
import logging
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks.cache import cache, cached

LARGEST, TARGETS = 50, range(1, 100)
HELD_OUT = 26  # of 256 problems
CHARACTERS = "0123456789 +-=:"
# Count the version up with every change.
WARM_UP: dict[str, Any] = dict(hidden=64, layers=2, steps=1300, batch=64, lr=4e-3, wrong_from=0.75, version=3)
WRONG = {3: 0.5, 4: 0.8}  # share of wrong demonstrations from then on, by how many numbers a problem has

log = logging.getLogger("tba")


# ---- demonstrations ----


def random_expression(rng: random.Random, count: int) -> tuple[list[int], str, int]:
    """Numbers, the same in another order joined by + and -, and the value of that."""
    numbers = [rng.randint(1, LARGEST) for _ in range(count)]
    first, *others = rng.sample(numbers, count)
    terms = [str(first), *(rng.choice("+-") + str(number) for number in others)]
    return numbers, "".join(terms), sum(map(int, terms))


def held_out(numbers: list[int], target: int) -> bool:
    """Whether a problem is for testing: one in ten is, in any order of its numbers."""
    return hashlib.sha256(f"{sorted(numbers)} {target}".encode()).digest()[0] < HELD_OUT


def demonstration(rng: random.Random, count: int, wrong: float) -> tuple[str, str]:
    """(prompt, response) of a problem that is not held out. With probability `wrong` the target is any other, and of 4
    numbers the prompt then has one that the response does not."""
    while True:
        numbers, response, target = random_expression(rng, count)
        if rng.random() < wrong:
            target = rng.choice(TARGETS)
            if count == 4:
                numbers[rng.randrange(count)] = rng.randint(1, LARGEST)
        if target in TARGETS and not held_out(numbers, target):
            return f"{' '.join(map(str, numbers))}={target}:", response


def encode(pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of tokens and labels, padded to the longest; the prompt and the padding have no label (-100)."""
    ids = {character: i for i, character in enumerate(CHARACTERS, 1)}
    prompts = [[ids[c] for c in prompt] for prompt, _ in pairs]
    responses = [[ids[c] for c in response] + [0] for _, response in pairs]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens, labels = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        padding = longest - len(prompt) - len(response)
        tokens.append(prompt + response + [0] * padding)
        labels.append([-100] * len(prompt) + response + [-100] * padding)
    return tokens, labels


# ---- the model ----


def prepare(seed: int, numbers: int, trained: bool = True) -> str:
    """The folder of the model for a seed; where the cache does not have it, it is trained now.

    Args:
        seed: of its weights and its demonstrations.
        numbers: in a problem.
        trained: False: random weights will do, for a run that never reads them.
    """
    what = [WARM_UP, WRONG, CHARACTERS, numbers, LARGEST, list(TARGETS), HELD_OUT, seed]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    name = f"countdown-{key}"
    if not trained and not (cache() / name).is_dir():
        untrained = tempfile.TemporaryDirectory()
        atexit.register(untrained.cleanup)
        warm_up(Path(untrained.name), seed, numbers, steps=0)
        return untrained.name
    return cached(name, lambda folder: warm_up(folder, seed, numbers, WARM_UP["steps"]))


def warm_up(folder: Path, seed: int, numbers: int, steps: int) -> None:
    """Train the model from scratch on demonstrations and write it as a Hugging Face folder."""
    import torch
    from tqdm import trange
    from transformers import LlamaConfig, LlamaForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two runs that warm up at once would wait for each other's threads, for many minutes
    torch.manual_seed(seed)
    rng = random.Random(f"countdown warm-up {seed}")
    tokenizer, hidden = make_tokenizer(), WARM_UP["hidden"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # exactly: an id without a character would be sampled now and then
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=WARM_UP["layers"],
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,  # the smallest that vLLM takes on the CPU
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), WARM_UP["lr"], betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, max(0.05, math.cos(step / max(1, steps) * math.pi / 2)))
    )
    what, terminal = "warming up the embedded model, once", sys.stderr.isatty()
    if steps and not terminal:
        log.info(f"{what} ...")
    for step in trange(steps, desc=what, ncols=120, disable=not (steps and terminal)):
        wrong = WRONG[numbers] if step >= steps * WARM_UP["wrong_from"] else 0.0
        tokens, labels = encode([demonstration(rng, numbers, wrong) for _ in range(WARM_UP["batch"])])
        model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer():
    """A tokenizer with a token a character, and one for the end of a sequence."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<eos>"
    tokenizer = Tokenizer(models.WordLevel({end: 0} | {c: i for i, c in enumerate(CHARACTERS, 1)}, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
