"""The replay buffer: the responses to each prompt in a heap.

A group comes in: the responses that one search gives for one prompt. A batch of groups goes out: B distinct prompts
with exactly K responses each. Which response leaves a full heap (`EVICTION`), which responses of a prompt are replayed
(`REPLAY`) and when two count as one (`NEAR_DUPLICATES`) are plain functions: write yours in a file of your own and give
it by `--evict FILE.py:NAME` or `--replay FILE.py:NAME`, or change `Buffer.sample`.

No operation gets slower as the buffer fills: a prompt has at most `capacity` responses, and prompts are found by index.
All prompts together are bounded in bytes; beyond that the oldest response leaves first.
"""

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

OVERHEAD = 1000  # bytes of a response beside its arrays' contents: objects, keys, entries in heaps and dictionaries


@dataclass(slots=True, eq=False)
class Response:
    """A response to a prompt, from the engine that generates it to the loss."""

    tokens: np.ndarray  # int32 [T], end-of-sequence token included where it has one
    finished: bool  # False: cut off at --max-tokens, so without an end-of-sequence token
    version: int = 0  # the trainer's step whose weights began it
    reward: float = math.nan  # nan: not scored, or its reward failed
    text: str = ""  # for the reward; dropped when it is stored
    logprobs: np.ndarray | None = None  # float32 [T], under the policy that wrote it; None: not requested
    ref_logprobs: np.ndarray | None = None  # float32 [T], under the reference; None: not computed yet
    ref_version: int = 0  # how often the reference had been reset
    embedding: np.ndarray | None = None  # float32 [D], of length 1: only where the buffer compares by it
    per_token: dict[str, np.ndarray] | None = None  # float32 [T] each: a loss reads them as `batch.extra`
    info: dict[str, float] | None = None  # a task's own figures, for its `evaluate`; dropped when it is stored

    @property
    def nbytes(self) -> int:
        """Memory of a stored response: tokens twice, log-probabilities (the reference's will come), and the rest."""
        per_token = 3 + (self.logprobs is not None) + len(self.per_token or ())
        embedding = 0 if self.embedding is None else len(self.embedding)
        return 4 * (len(self.tokens) * per_token + embedding) + OVERHEAD


@dataclass(slots=True, eq=False)
class Group:
    """Responses to one prompt."""

    prompt_id: int
    prompt: np.ndarray  # int32 [P]
    responses: list[Response]


def oldest(response: Response) -> float:
    """Evict the response that came first: all keys are equal."""
    return 0.0


def lowest_reward(response: Response) -> float:
    """Evict the response with the lowest reward, and among equals the one that came first."""
    return response.reward


def uniform(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, all equally likely."""
    return rng.permutation(len(rewards))[:k]


def by_reward(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, drawn one after another by softmax of the reward (the Gumbel top-k trick)."""
    return np.argsort(-(rewards + rng.gumbel(size=len(rewards))), kind="stable")[:k]


def edit(new: Response, stored: list[Response]) -> np.ndarray:
    """Edit distance of a response to each stored one [N], in tokens, over the tokens of both: from 0 to 1."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def text(response: Response) -> str:  # a character a token, which is what the library is fast with
        return response.tokens.astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")

    edits = cdist([text(new)], [text(response) for response in stored], scorer=Levenshtein.distance)[0]
    return edits / (len(new.tokens) + np.array([len(response.tokens) for response in stored]))


def cosine(new: Response, stored: list[Response]) -> np.ndarray:
    """Cosine distance of a response's embedding to each stored one's [N]: from 0 to 2."""
    return 1 - np.stack([response.embedding for response in stored]) @ new.embedding


EVICTION: dict[str, Callable] = {"oldest": oldest, "lowest_reward": lowest_reward}
REPLAY: dict[str, Callable] = {"uniform": uniform, "reward": by_reward}
NEAR_DUPLICATES: dict[str, Callable | None] = {"exact": None, "edit": edit, "cosine": cosine}


@dataclass(slots=True)
class _Prompt:
    tokens: np.ndarray
    index: int  # in `Buffer.prompt_ids`
    heap: list[tuple[float, int, Response]] = field(default_factory=list)  # (eviction key, arrival, response)
    stored: dict[bytes, Response] = field(default_factory=dict)  # by the response's tokens
    last_group: list[Response] = field(default_factory=list)  # duplicates included


@dataclass(eq=False)
class Buffer:
    """The responses of a run, in memory."""

    capacity: int = 100  # responses of a prompt
    evict: Callable = oldest  # key of a response: the smallest leaves a full heap first, the oldest among equals
    replay: Callable = uniform  # chooses k responses of a prompt that is not drawn from the newest data
    seed: int | list[int] = 0  # of the sampling
    distance: Callable | None = None  # of a response to stored ones; None: only exact duplicates count as one
    min_distance: float = 0.25  # of two responses to a prompt that are this near the better stays, of equals the first
    max_bytes: float = math.inf  # of all responses; beyond it the oldest leaves, and a prompt with its last response
    min_prompts: int = 1  # stay in any case, each with its newest response

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.prompts: dict[int, _Prompt] = {}
        self.prompt_ids: list[int] = []  # to draw one by index
        self.by_recency: OrderedDict[int, None] = OrderedDict()  # prompt ids by their last arrival, the newest last
        self.window: set[int] = set()  # prompt ids that arrived since the last sync
        self.by_age: OrderedDict[Response, int] = OrderedDict()  # prompt id of all responses, the oldest first
        self.arrivals = self.nbytes = 0
        self.repeated = 0  # responses that filled a batch up where a prompt had fewer than K

    def __len__(self) -> int:
        return len(self.by_age)

    def gauges(self) -> dict[str, float]:
        """Figures for metrics.jsonl."""
        return {"buffer_size": len(self), "buffer_bytes": self.nbytes, "repeated": self.repeated}

    def add(self, group: Group, on_policy: bool = True) -> None:
        """Store a group, as newest data; or, where it is not `on_policy`, to be replayed only.

        An exact duplicate replaces the response stored before it; with a `distance` only a better one does.
        """
        entry = self._prompt(group.prompt_id, group.prompt)
        new = {response.tokens.tobytes(): response for response in group.responses}  # of duplicates the last
        if not self.distance:
            self._remove(entry, new.keys() & entry.stored.keys())
        for key, response in new.items():
            response.text, response.info = "", None
            if self.distance and entry.stored:
                distances = self.distance(response, list(entry.stored.values()))
                near = [k for k, d in zip(entry.stored, distances, strict=True) if d <= self.min_distance]
                if any(entry.stored[k].reward >= response.reward for k in near):
                    continue
                self._remove(entry, near)
            self._store(group.prompt_id, entry, key, response)
            if len(entry.heap) > self.capacity:
                self._remove(entry, [entry.heap[0][-1].tokens.tobytes()])
        if on_policy:
            entry.last_group = [new[r.tokens.tobytes()] for r in group.responses]  # as often as the policy wrote it
            self.by_recency[group.prompt_id] = None
            self.by_recency.move_to_end(group.prompt_id)
            self.window.add(group.prompt_id)
        self._trim()

    def start_window(self) -> None:
        """Start the window of the newest data: call it when a sync is done."""
        self.window.clear()

    def sample(self, prompts: int, responses: int, on_policy_prob: float) -> list[Group]:
        """A batch of `prompts` distinct prompts with `responses` responses each.

        With probability `on_policy_prob` a prompt comes from those that arrived since the last sync (from the last
        `prompts` to arrive, while fewer did) with responses of its last group, duplicates included: a sample of the
        policy that wrote them. Else it is any prompt, its distinct responses chosen by `replay`. Where a prompt has
        fewer than `responses`, they are repeated evenly, and counted in `repeated`.

        Raises:
            ValueError: the buffer has fewer than `prompts` prompts.
        """
        if len(self.prompt_ids) < prompts:
            raise ValueError(f"a batch needs {prompts} prompts, the buffer has {len(self.prompt_ids)}")
        newest = list(itertools.islice(reversed(self.by_recency), max(len(self.window), prompts)))
        self.rng.shuffle(newest)
        chosen: dict[int, bool] = {}  # prompt id -> whether it was drawn from the newest data
        while len(chosen) < prompts:
            new = self.rng.random() < on_policy_prob and bool(newest)
            prompt_id = newest.pop() if new else self.prompt_ids[self.rng.integers(len(self.prompt_ids))]
            chosen.setdefault(prompt_id, new)
        return [
            Group(i, self.prompts[i].tokens, self._responses(self.prompts[i], responses, new))
            for i, new in chosen.items()
        ]

    def _responses(self, entry: _Prompt, k: int, new: bool) -> list[Response]:
        pool, choose = (entry.last_group, uniform) if new else (list(entry.stored.values()), self.replay)
        whole, rest = divmod(k, len(pool))
        picked = choose(np.array([response.reward for response in pool]), rest, self.rng)
        self.repeated += max(0, k - len(pool))
        return pool * whole + [pool[i] for i in picked]

    def _prompt(self, prompt_id: int, tokens: np.ndarray) -> _Prompt:
        if prompt_id not in self.prompts:
            self.prompts[prompt_id] = _Prompt(tokens, len(self.prompt_ids))
            self.prompt_ids.append(prompt_id)
        return self.prompts[prompt_id]

    def _store(self, prompt_id: int, entry: _Prompt, key: bytes, response: Response) -> None:
        entry.stored[key] = response
        heapq.heappush(entry.heap, (self.evict(response), self.arrivals, response))
        self.arrivals += 1
        self.by_age[response] = prompt_id
        self.nbytes += response.nbytes

    def _remove(self, entry: _Prompt, keys: Iterable[bytes]) -> None:
        removed = {entry.stored.pop(key) for key in keys}
        for response in removed:
            del self.by_age[response]
            self.nbytes -= response.nbytes
        if len(removed) == 1 and entry.heap[0][-1] in removed:
            heapq.heappop(entry.heap)
        elif removed:
            entry.heap = [item for item in entry.heap if item[-1] not in removed]
            heapq.heapify(entry.heap)

    def _trim(self) -> None:
        while self.nbytes > self.max_bytes and len(self) > self.min_prompts:
            response, prompt_id = next(iter(self.by_age.items()))
            entry = self.prompts[prompt_id]
            if len(entry.stored) == 1 and len(self.prompt_ids) <= self.min_prompts:
                self.by_age.move_to_end(response)
                continue
            self._remove(entry, [response.tokens.tobytes()])
            if not entry.stored:
                self._forget(prompt_id)

    def _forget(self, prompt_id: int) -> None:
        index, last = self.prompts.pop(prompt_id).index, self.prompt_ids.pop()
        if last != prompt_id:
            self.prompt_ids[index] = last
            self.prompts[last].index = index
        self.by_recency.pop(prompt_id, None)
        self.window.discard(prompt_id)

    def state_dict(self) -> dict:
        """The state of the buffer; cheap, since it shares the responses: only the reference's figures of one change."""
        prompts = [(i, p.tokens, [item[1:] for item in p.heap], p.last_group) for i, p in self.prompts.items()]
        responses = itertools.chain(self.by_age, *(last_group for *_, last_group in prompts))
        return {
            "prompts": prompts,  # (prompt id, its tokens, (arrival, response) of each stored one, the last group)
            "reference": {response: (response.ref_version, response.ref_logprobs) for response in responses},
            "prompt_ids": self.prompt_ids[:],
            "by_recency": list(self.by_recency),
            "window": sorted(self.window),
            "rng": self.rng.bit_generator.state,
            "repeated": self.repeated,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore, while empty, the state that `state_dict` gave."""
        prompts = {prompt_id: (tokens, last_group) for prompt_id, tokens, _, last_group in state["prompts"]}
        for prompt_id in state["prompt_ids"]:
            tokens, last_group = prompts[prompt_id]
            self._prompt(prompt_id, tokens).last_group = last_group
        stored = [(arrival, prompt_id, r) for prompt_id, _, pairs, _ in state["prompts"] for arrival, r in pairs]
        for self.arrivals, prompt_id, response in sorted(stored, key=lambda each: each[0]):
            self._store(prompt_id, self.prompts[prompt_id], response.tokens.tobytes(), response)
        for response, (version, logprobs) in state["reference"].items():
            response.ref_version, response.ref_logprobs = version, logprobs
        self.by_recency = OrderedDict.fromkeys(state["by_recency"])
        self.window = set(state["window"])
        self.rng.bit_generator.state, self.repeated = state["rng"], state["repeated"]
