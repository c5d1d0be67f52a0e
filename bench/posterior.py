"""Does an objective reach the posterior pi* ~ pi_ref exp(r/beta), and from data how old?

    python -m bench.posterior             3 seeds, 30 to 40 minutes on 2 cores; draws docs/posterior.png
    python -m bench.posterior --losses tb tb_tapered          some of the objectives
    python -m bench.posterior --quick     one seed, under 3 minutes
    python -m bench.posterior --json      prints, last, the rows as one JSON object

The problem is small enough to be enumerated: 2 prompts, 4 tokens of which one ends a response, at most 4 tokens a
response, so 121 responses. 6 of them, chosen at random for each prompt, are the modes: reward 1, all others 0. A tiny
random Llama is the reference, and the policy at the start. The trainer is the project's own; what is replaced is
search: responses are drawn from the exact distribution of the policy as it was `staleness` updates ago ("policy"), or
from a buffer that was filled before with uniformly random ones and stays as it is ("uniform": no policy wrote them).

Distances are exact: KL(pi||pi*) in nats and total variation, each the mean over the prompts, in float64. A mode is
found when the policy gives it at least half of what pi* does.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

from bench.table import PROJECT, at_least
from buffer import Buffer, Group, Response
from config import Config
from loss import OBJECTIVES

END, LETTERS, LONGEST = 0, (1, 2, 3), 4
PROMPTS = [np.array(prompt, dtype=np.int32) for prompt in ([1, 2], [3, 1])]
MODES, BETA = 6, 0.3
K, UPDATES, LR, WARM_UP = 64, 800, 2e-3, 20
STALENESS = (0, 4, 16, 64)
PLACES = [*(f"{s} updates old" for s in STALENESS), "uniformly random"]
RUNS = [*OBJECTIVES, "tb_prime_no_ratio"]

BODIES = [body for length in range(LONGEST) for body in itertools.product(LETTERS, repeat=length)]
RESPONSES = [(*body, END) for body in BODIES] + list(itertools.product(LETTERS, repeat=LONGEST))


class World:
    """The enumerated problem: token tables [121, 4] of all responses, and which of them pay."""

    def __init__(self, seed: int):
        full = list(itertools.product(LETTERS, repeat=LONGEST - 1))  # whose prefixes are all prefixes
        first = {body: next(i for i, each in enumerate(full) if each[: len(body)] == body) for body in BODIES}
        self.inputs = [torch.tensor([[*prompt.tolist(), *body] for body in full]) for prompt in PROMPTS]
        self.row = torch.tensor([first[y[: LONGEST - 1] if y[-1] != END else y[:-1]] for y in RESPONSES])
        self.tokens = torch.tensor([[*y, *[0] * (LONGEST - len(y))] for y in RESPONSES])
        self.mask = torch.tensor([[1.0] * len(y) + [0.0] * (LONGEST - len(y)) for y in RESPONSES], dtype=torch.float64)
        rng = np.random.default_rng(seed)
        self.rewards = torch.zeros(len(PROMPTS), len(RESPONSES), dtype=torch.float64)
        for rewards in self.rewards:
            rewards[rng.choice(len(RESPONSES), MODES, replace=False)] = 1.0

    @torch.no_grad()
    def logprobs(self, model: torch.nn.Module) -> torch.Tensor:
        """Log-probability of every token of every response under a model [prompts, 121, 4], 0 in the padding."""
        found = []
        for prompt, inputs in zip(PROMPTS, self.inputs, strict=True):
            table = model(inputs).logits[:, len(prompt) - 1 :].double().log_softmax(-1)
            found.append(table[self.row].gather(-1, self.tokens[..., None])[..., 0] * self.mask)
        return torch.stack(found)

    def uniform(self) -> torch.Tensor:
        """The same of the policy under which all 121 responses are as likely [prompts, 121, 4]."""
        leaves = [1]
        for _ in range(LONGEST):
            leaves.append(1 + len(LETTERS) * leaves[-1])  # responses that go on from a prefix
        left = torch.tensor(leaves[:0:-1], dtype=torch.float64)
        after = torch.where(self.tokens == END, 1.0, torch.tensor(leaves[-2::-1], dtype=torch.float64))
        return ((after / left).log() * self.mask).expand(len(PROMPTS), -1, -1)

    def distance(self, logprobs: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """KL(pi||pi*) in nats, total variation, and the modes found of 2 x 6."""
        log_pi, log_best = logprobs.sum(-1), (reference.sum(-1) + self.rewards / BETA).log_softmax(-1)
        pi, best = log_pi.exp(), log_best.exp()
        return {
            "kl": (pi * (log_pi - log_best)).sum(-1).mean().item(),
            "tv": (pi - best).abs().sum(-1).mean().item() / 2,
            "modes": int(((pi > best / 2) & (self.rewards > 0)).sum()),
        }

    def groups(self, behaviour: torch.Tensor, rng: np.random.Generator, count: int) -> list[Group]:
        """So many responses to each prompt, drawn by their probabilities."""
        groups = []
        for i, prompt in enumerate(PROMPTS):
            weights = behaviour[i].sum(-1).exp().numpy()
            drawn = rng.choice(len(RESPONSES), count, p=weights / weights.sum())
            groups.append(Group(i, prompt, [self.response(i, j, behaviour) for j in drawn]))
        return groups

    def response(self, i: int, j: int, behaviour: torch.Tensor) -> Response:
        """Response j to prompt i, as the searcher would return it, with its reward."""
        y = RESPONSES[j]
        logprobs = behaviour[i, j, : len(y)].float().numpy()
        return Response(np.array(y, dtype=np.int32), y[-1] == END, reward=self.rewards[i, j].item(), logprobs=logprobs)


def make_model(seed: int, folder: str) -> None:
    """A tiny Llama with random weights, large enough that it likes some tokens better than others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1 + len(LETTERS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.06, bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def train(name: str, data: str, staleness: int, seed: int, updates: int = UPDATES) -> dict[str, float]:
    """Train with an objective on "policy" data so many updates old, or on "uniform" data; the distance to pi*."""
    from train.trainer import Trainer

    torch.set_num_threads(1)
    config = Config(loss=name.removesuffix("_no_ratio"), importance_ratio=not name.endswith("_no_ratio"))
    world, rng = World(seed), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        make_model(seed, folder)
        trainer = Trainer(folder, config, "cpu")
    reference = world.logprobs(trainer.reference)
    past = deque([reference], maxlen=staleness + 1)  # the policy after each of the last updates
    fixed = Buffer(capacity=len(RESPONSES), seed=seed)
    if data == "uniform":
        for group in world.groups(world.uniform(), rng, 2000):
            fixed.add(group)
    for step in range(updates):
        groups = fixed.sample(len(PROMPTS), K, 0.0) if data == "uniform" else world.groups(past[0], rng, K)
        lr = LR * min((step + 1) / WARM_UP, 1 - step / updates)
        trainer.update(groups, lr=lr, beta=BETA)
        if data == "policy":
            past.append(world.logprobs(trainer.policy))
    return world.distance(world.logprobs(trainer.policy), reference)


def main() -> None:
    """Run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and a quarter of the updates")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object, last")
    parser.add_argument("--updates", type=at_least(1), help=f"default {UPDATES}, with --quick {UPDATES // 4}")
    parser.add_argument("--losses", nargs="+", choices=RUNS, default=RUNS, metavar="NAME")
    parser.add_argument("--picture", default=str(PROJECT / "docs" / "posterior.png"), help="where it is drawn")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    seeds = range(1 if arguments.quick else 3)
    updates = arguments.updates or (UPDATES // 4 if arguments.quick else UPDATES)
    cases = [
        (name, *case) for name in arguments.losses for case in [*(("policy", s) for s in STALENESS), ("uniform", None)]
    ]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = [[pool.submit(train, *case[:2], case[2] or 0, seed, updates) for seed in seeds] for case in cases]
        for _ in tqdm(as_completed(itertools.chain(*jobs)), total=len(cases) * len(seeds), unit="run", mininterval=5):
            pass
        rows = [row(case, [job.result() for job in each]) for case, each in zip(cases, jobs, strict=True)]
    print(f"{updates} updates of {len(PROMPTS)} x {K} responses, {len(seeds)} seeds: median (lowest to highest)\n")
    show(rows)
    draw(rows, arguments.picture)
    if arguments.json:
        print(json.dumps({"rows": rows}))


def show(rows: list[dict]) -> None:
    """Print all figures, and the medians of KL side by side."""
    print("| objective | data | staleness | KL(pi, pi*) | total variation | modes of 12 |\n|---|---|---|---|---|---|")
    for each in rows:
        spread = [f"{each[n]:.3g} ({each[f'{n}_range'][0]:.3g} to {each[f'{n}_range'][1]:.3g})" for n in ("kl", "tv")]
        age = "" if each["staleness"] is None else each["staleness"]
        print(f"| {each['loss']} | {each['data']} | {age} | {' | '.join(spread)} | {each['modes']:g} |")
    print(f"\nKL(pi, pi*), medians\n\n| objective | {' | '.join(PLACES)} |\n" + "|---" * (len(PLACES) + 1) + "|")
    for name in dict.fromkeys(each["loss"] for each in rows):
        medians = [f"{each['kl']:.2g}" for each in rows if each["loss"] == name]
        print(f"| {name} | {' | '.join(medians)} |")


def row(case: tuple, results: list[dict]) -> dict:
    """Median and range over the seeds."""
    figures: dict = dict(zip(("loss", "data", "staleness"), case, strict=True))
    for name in ("kl", "tv", "modes"):
        values = [result[name] for result in results]
        figures[name], figures[f"{name}_range"] = statistics.median(values), [min(values), max(values)]
    return figures


def draw(rows: list[dict], path: str) -> None:
    """KL against staleness, a line an objective; at the right what uniform data gave."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    places = range(len(PLACES))
    for i, name in enumerate(dict.fromkeys(each["loss"] for each in rows)):
        mine = [each for each in rows if each["loss"] == name]
        middle, (low, high) = [each["kl"] for each in mine], zip(*(each["kl_range"] for each in mine), strict=True)
        beside = [place + 0.03 * (i - 3) for place in places]
        style = {"color": f"C{i}", "marker": "o", "linewidth": 2.5 if name in ("tb", "tb_tapered") else 1.2}
        axes.plot(beside[:-1], middle[:-1], label=name, **style)
        axes.plot(beside[-1:], middle[-1:], linestyle="none", **style)
        axes.vlines(beside, low, high, color=f"C{i}", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(places, PLACES)
    axes.set_ylabel("KL(pi || pi*), nats")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
