"""What storing and sampling cost, as the buffer grows: a batch of 140 is to take under 2 ms at a million responses.

    python -m bench.buffer                      at 1, 10,000 and 1,000,000 stored responses: about 2 minutes
    python -m bench.buffer --sizes 1 1000       at others
    python -m bench.buffer --json               prints, last, the rows as one JSON object

Responses of 200 tokens with the reference's log-probabilities, 20 to a prompt in groups of 20, in a buffer that holds
20 of a prompt: at its full size each insertion evicts. A batch is 7 prompts x 20 responses, half of it from the newest
data, chosen by reward. `insert_us` is the time of a response, `sample_ms` of a batch; bytes are those that Python and
numpy have allocated for it (tracemalloc), in a second filling that is not timed.
"""

import gc
import time
import tracemalloc

import numpy as np

from bench.table import at_least, median_and_range, parser, show
from buffer import Buffer, Group, Response, by_reward

TOKENS, GROUP, BATCH = 200, 20, 140


def group(prompt_id: int, count: int, rng: np.random.Generator) -> Group:
    """Responses as search and training leave them."""
    tokens = rng.integers(0, 32000, (count, TOKENS), dtype=np.int32)
    logprobs = rng.standard_normal((count, TOKENS), dtype=np.float32)
    rewards = rng.random(count).tolist()
    responses = [
        Response(tokens[i].copy(), True, reward=rewards[i], ref_logprobs=logprobs[i].copy()) for i in range(count)
    ]
    return Group(prompt_id, np.arange(100, dtype=np.int32), responses)


def filled(size: int, rng: np.random.Generator) -> Buffer:
    """A buffer that holds so many responses."""
    buffer = Buffer(capacity=GROUP, replay=by_reward)
    for prompt_id, start in enumerate(range(0, size, GROUP)):
        buffer.add(group(prompt_id, min(GROUP, size - start), rng))
    return buffer


def measure(size: int, repeats: int) -> dict:
    """A row."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    buffer = filled(size, rng)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    counted = buffer.nbytes
    del buffer
    gc.collect()
    buffer = filled(size, rng)
    count, prompts = min(GROUP, size), len(buffer.prompts)
    inserts, samples = [], []
    for _ in range(repeats):
        fresh = [group(int(rng.integers(prompts)), count, rng) for _ in range(100)]
        began = time.perf_counter()
        for each in fresh:
            buffer.add(each)
        inserts.append(1e6 * (time.perf_counter() - began) / (100 * count))
        buffer.start_window()
        for each in fresh:
            buffer.add(each)
        batch = min(BATCH // GROUP, prompts)
        began = time.perf_counter()
        for _ in range(100):
            buffer.sample(batch, BATCH // batch, on_policy_prob=0.5)
        samples.append(1e3 * (time.perf_counter() - began) / 100)
    return {
        "responses": size,
        "insert_us": float(np.median(inserts)),
        "sample_ms": float(np.median(samples)),
        "bytes_per_response": taken / size,
        "bytes_counted": counted / size,
        "inserts": inserts,
        "samples": samples,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table."""
    commands = parser(__doc__)
    commands.add_argument("--sizes", type=at_least(1), nargs="+", default=[1, 10_000, 1_000_000])
    wanted = commands.parse_args(arguments)
    rows = [measure(size, wanted.repeats) for size in wanted.sizes]
    cells = [
        (
            f"{row['responses']:,}",
            median_and_range(row["inserts"], 1),
            median_and_range(row["samples"], 2),
            f"{row['bytes_per_response']:,.0f}",
            f"{row['bytes_counted']:,.0f}",
        )
        for row in rows
    ]
    names = "responses stored", "insert one, us", "batch of 140, ms", "bytes a response", "as --buffer-gib counts"
    show(names, cells, {"rows": rows}, wanted.json)


if __name__ == "__main__":
    main()
