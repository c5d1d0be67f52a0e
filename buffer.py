"""The replay buffer: trajectories by prompt, a heap a prompt.

What comes in is a group, the responses that one search found for one prompt. What goes out is a batch of groups,
B distinct prompts with exactly K responses each. Which response leaves a full heap, and which responses of a prompt
are trained on, are plain functions (`EVICTION`, `REPLAY`): add yours there. So are the distances by which responses
are kept apart (`NEAR_DUPLICATE`).

Nothing here costs more as more is stored: a prompt holds at most `capacity` responses, and prompts are found by index.
What all prompts hold together is bounded in responses and in bytes; the oldest of all leaves first.
"""

import heapq
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

OVERHEAD = 1000  # bytes of a response beside its arrays' contents: objects, keys, places in heaps and dictionaries
FILE = "buffer.safetensors"
SCALARS = dict(finished=np.bool_, reward=np.float64, version=np.int64, ref_version=np.int64)  # of a trajectory, on disk
ARRAYS = dict(tokens=np.int32, logprobs=np.float32, ref_logprobs=np.float32, embedding=np.float32)


@dataclass(slots=True, eq=False)
class Trajectory:
    """One response to a prompt."""

    tokens: np.ndarray  # int32 [T], end-of-sequence token included where the response has one
    finished: bool  # False: it ran into the length limit, so that it has no end-of-sequence token
    reward: float
    version: int  # the trainer's step whose weights began it
    logprobs: np.ndarray | None = None  # float32 [T], of its tokens under the policy that wrote it; None: not asked for
    ref_logprobs: np.ndarray | None = None  # float32 [T], of its tokens under the reference; None: not computed yet
    ref_version: int = 0  # how often the reference had been reset
    embedding: np.ndarray | None = None  # float32 [D], of length 1: only where the buffer compares by it

    @property
    def nbytes(self) -> int:
        """Memory that it takes in a buffer: tokens twice, log-probabilities (the reference's will come), the rest."""
        figures = len(self.tokens) * (3 + (self.logprobs is not None)) + (
            0 if self.embedding is None else len(self.embedding)
        )
        return 4 * figures + OVERHEAD


@dataclass(slots=True, eq=False)
class Group:
    """Responses to one prompt."""

    prompt_id: int
    prompt: np.ndarray  # int32 [P]
    responses: list[Trajectory]


def oldest(trajectory: Trajectory) -> float:
    """Evict what came first: all are equal."""
    return 0.0


def lowest_reward(trajectory: Trajectory) -> float:
    """Evict the worst, and among equals what came first."""
    return trajectory.reward


def uniform(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, each response as likely as another."""
    return rng.permutation(len(rewards))[:k]


def by_reward(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, drawn one after another by softmax of the reward (the Gumbel top-k trick)."""
    return np.argsort(-(rewards + rng.gumbel(size=len(rewards))), kind="stable")[:k]


def edit(new: Trajectory, stored: list[Trajectory]) -> np.ndarray:
    """Distance of a response to each stored one [N]: edits of tokens, over the tokens of both; from 0 to 1."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def text(response: Trajectory) -> str:  # a character a token, which is what the library is fast with
        return response.tokens.astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")

    edits = cdist([text(new)], [text(response) for response in stored], scorer=Levenshtein.distance)[0]
    return edits / (len(new.tokens) + np.array([len(response.tokens) for response in stored]))


def cosine(new: Trajectory, stored: list[Trajectory]) -> np.ndarray:
    """Cosine distance of a response's embedding to each stored one's [N]; from 0 to 2."""
    return 1 - np.stack([response.embedding for response in stored]) @ new.embedding


EVICTION = {"oldest": oldest, "lowest_reward": lowest_reward}
REPLAY = {"uniform": uniform, "reward": by_reward}
NEAR_DUPLICATE = {"exact": None, "edit": edit, "cosine": cosine}


@dataclass(slots=True)
class _Prompt:
    tokens: np.ndarray
    place: int  # in `Buffer.seen`
    heap: list[tuple[float, int, Trajectory]] = field(default_factory=list)  # (eviction key, arrival, it)
    stored: dict[bytes, Trajectory] = field(default_factory=dict)  # by the response's tokens
    newest: list[Trajectory] = field(default_factory=list)  # the group that came last, duplicates included


class Buffer:
    """Trajectories of a run, in memory.

    Args:
        capacity: responses kept of a prompt.
        evict: a key for the heap; the response whose key is smallest leaves a full one first, the oldest among equals.
        replay: chooses k responses of a prompt that does not come from the newest data.
        seed: of the sampling.
        distance: of a response to stored ones; None: only exact duplicates are told.
        near: of two responses of a prompt that are this near, the better is kept, of equals the first.
        limit: responses kept of all prompts together; beyond it the oldest leaves, and a prompt with its last response.
        limit_bytes: the same, in memory.
        least: prompts that stay whatever the limits, each with its newest response.
    """

    def __init__(
        self,
        capacity: int = 100,
        evict: Callable = oldest,
        replay: Callable = uniform,
        seed: int | list[int] = 0,
        distance: Callable | None = None,
        near: float = 0.25,
        limit: float = float("inf"),
        limit_bytes: float = float("inf"),
        least: int = 1,
    ):
        self.capacity, self.evict, self.replay, self.distance, self.near = capacity, evict, replay, distance, near
        self.limit, self.limit_bytes, self.least = limit, limit_bytes, least
        self.rng = np.random.default_rng(seed)
        self.prompts: dict[int, _Prompt] = {}
        self.seen: list[int] = []  # prompt ids, to draw one by index
        self.recent: OrderedDict[int, None] = OrderedDict()  # prompt ids by their last arrival, the newest last
        self.arrived: set[int] = set()  # prompt ids that came since the last sync
        self.order: OrderedDict[Trajectory, int] = OrderedDict()  # all that is stored, the oldest first, by prompt id
        self.arrivals = 0
        self.nbytes = 0
        self.repeated = 0  # responses that filled a batch up where a prompt had fewer than K

    def __len__(self) -> int:
        return len(self.order)

    def add(self, group: Group, newest: bool = True) -> None:
        """Store a group. An exact duplicate replaces the one stored before it; where a distance tells duplicates, only
        a better one does.

        Args:
            group: responses to one prompt.
            newest: whether it is newest data; else it is replayed only.
        """
        entry = self._prompt(group.prompt_id, group.prompt)
        fresh = {t.tokens.tobytes(): t for t in group.responses}  # of duplicates the last stays
        if not self.distance:
            self._remove(entry, fresh.keys() & entry.stored.keys())
        for key, trajectory in fresh.items():
            if self.distance and entry.stored:
                distances = self.distance(trajectory, list(entry.stored.values()))
                near = [k for k, distance in zip(entry.stored, distances, strict=True) if distance <= self.near]
                if any(entry.stored[k].reward >= trajectory.reward for k in near):
                    continue
                self._remove(entry, near)
            self._store(group.prompt_id, entry, key, trajectory)
            if len(entry.heap) > self.capacity:
                self._remove(entry, [entry.heap[0][-1].tokens.tobytes()])
        if newest:
            entry.newest = [fresh[t.tokens.tobytes()] for t in group.responses]  # as often as the policy said it
            self.recent[group.prompt_id] = None
            self.recent.move_to_end(group.prompt_id)
            self.arrived.add(group.prompt_id)
        self._trim()

    def _prompt(self, prompt_id: int, tokens: np.ndarray) -> _Prompt:
        if prompt_id not in self.prompts:
            self.prompts[prompt_id] = _Prompt(tokens, len(self.seen))
            self.seen.append(prompt_id)
        return self.prompts[prompt_id]

    def _store(self, prompt_id: int, entry: _Prompt, key: bytes, trajectory: Trajectory) -> None:
        entry.stored[key] = trajectory
        heapq.heappush(entry.heap, (self.evict(trajectory), self.arrivals, trajectory))
        self.arrivals += 1
        self.order[trajectory] = prompt_id
        self.nbytes += trajectory.nbytes

    def _remove(self, entry: _Prompt, keys: Iterable[bytes]) -> None:
        gone = {entry.stored.pop(key) for key in keys}
        for trajectory in gone:
            del self.order[trajectory]
            self.nbytes -= trajectory.nbytes
        if len(gone) == 1 and entry.heap[0][-1] in gone:
            heapq.heappop(entry.heap)
        elif gone:
            entry.heap = [item for item in entry.heap if item[-1] not in gone]
            heapq.heapify(entry.heap)

    def _trim(self) -> None:
        while (len(self) > self.limit or self.nbytes > self.limit_bytes) and len(self) > self.least:
            trajectory, prompt_id = next(iter(self.order.items()))
            entry = self.prompts[prompt_id]
            if len(entry.stored) > 1:
                self._remove(entry, [trajectory.tokens.tobytes()])
            elif len(self.seen) > self.least:
                self._remove(entry, [trajectory.tokens.tobytes()])
                self._forget(prompt_id)
            else:
                self.order.move_to_end(trajectory)

    def _forget(self, prompt_id: int) -> None:
        place, last = self.prompts.pop(prompt_id).place, self.seen.pop()
        if last != prompt_id:
            self.seen[place] = last
            self.prompts[last].place = place
        self.recent.pop(prompt_id, None)
        self.arrived.discard(prompt_id)

    def start_window(self) -> None:
        """From now on, what comes is the newest data: call it when a sync is done."""
        self.arrived.clear()

    def sample(self, prompts: int, responses: int, on_policy_prob: float) -> list[Group]:
        """A batch of `prompts` distinct prompts with `responses` responses each.

        With probability `on_policy_prob` a prompt comes from what arrived since the last sync (from the last `prompts`
        to arrive, while fewer did) with responses of its last group, duplicates included: a sample of the policy that
        wrote them. Else it is any prompt seen, its distinct responses chosen by `replay`. Where a prompt has fewer than
        `responses`, they are repeated evenly, and counted in `repeated`.

        Raises:
            ValueError: fewer than `prompts` prompts were seen.
        """
        if len(self.seen) < prompts:
            raise ValueError(f"a batch needs {prompts} prompts, the buffer has {len(self.seen)}")
        window = max(len(self.arrived), prompts)
        newest = list(itertools.islice(reversed(self.recent), window))
        self.rng.shuffle(newest)
        chosen: dict[int, bool] = {}  # prompt id -> whether it was drawn as new
        while len(chosen) < prompts:
            new = self.rng.random() < on_policy_prob and bool(newest)
            prompt_id = newest.pop() if new else self.seen[self.rng.integers(len(self.seen))]
            chosen.setdefault(prompt_id, new)
        return [
            Group(prompt_id, self.prompts[prompt_id].tokens, self._responses(self.prompts[prompt_id], responses, new))
            for prompt_id, new in chosen.items()
        ]

    def _responses(self, entry: _Prompt, k: int, new: bool) -> list[Trajectory]:
        pool, choose = (entry.newest, uniform) if new else (list(entry.stored.values()), self.replay)
        whole, rest = divmod(k, len(pool))
        picked = choose(np.array([t.reward for t in pool]), rest, self.rng)
        self.repeated += max(0, k - len(pool))
        return pool * whole + [pool[i] for i in picked]

    def snapshot(self) -> Callable[[Path], None]:
        """Everything as it is now; what is returned writes it to a folder, as buffer.safetensors: a column a field.

        It costs little, for it shares the responses: of one that is stored only the reference's figures are set anew.
        """
        prompts = [(i, self.prompts[i].tokens, self.prompts[i].heap[:], self.prompts[i].newest) for i in self.seen]
        recent, arrived = list(self.recent), sorted(self.arrived)
        newest = [trajectory for *_, group in prompts for trajectory in group]
        reference = {t: (t.ref_version, t.ref_logprobs) for t in itertools.chain(self.order, newest)}
        state = {"rng": self.rng.bit_generator.state, "repeated": self.repeated}

        def write(folder: Path) -> None:
            from safetensors.numpy import save_file

            arrivals = {t: (place, at) for place, (_, _, heap, _) in enumerate(prompts) for _, at, t in heap}
            for place, (_, _, _, newest) in enumerate(prompts):
                for trajectory in newest:
                    arrivals.setdefault(trajectory, (place, -1))  # it has left, or was never stored
            index = {trajectory: i for i, trajectory in enumerate(arrivals)}
            fields = {name: [getattr(t, name) for t in index] for name in (*SCALARS, *ARRAYS)}
            fields |= zip(
                ("ref_version", "ref_logprobs"), zip(*(reference[t] for t in index), strict=True), strict=False
            )
            columns: dict[str, np.ndarray] = {name: np.array(fields[name], dtype) for name, dtype in SCALARS.items()}
            for name, dtype in ARRAYS.items():
                columns |= _joined(name, fields[name], dtype)
            columns["place"], columns["arrival"] = np.array(list(arrivals.values()), np.int64).reshape(-1, 2).T.copy()
            columns |= _joined("newest", [[index[t] for t in newest] for *_, newest in prompts], np.int64)
            columns |= _joined("prompt", [tokens for _, tokens, _, _ in prompts], np.int32)
            columns |= {
                "prompt_id": np.array([prompt_id for prompt_id, *_ in prompts], np.int64),
                "recent": np.array(recent, np.int64),
                "arrived": np.array(arrived, np.int64),
            }
            save_file(columns, folder / FILE, metadata={"state": json.dumps(state)})

        return write

    def restore(self, folder: Path) -> None:
        """Be, while empty, what `snapshot` wrote."""
        from safetensors import safe_open

        with safe_open(folder / FILE, "numpy") as file:
            columns, state = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118
        self.rng.bit_generator.state = state["rng"]
        ids = columns["prompt_id"].tolist()
        entries = [self._prompt(i, tokens) for i, tokens in zip(ids, _parts("prompt", columns), strict=True)]
        fields = [columns[name].tolist() for name in SCALARS] + [_parts(name, columns) for name in ARRAYS]
        names = (*SCALARS, *ARRAYS)
        responses = [Trajectory(**dict(zip(names, row, strict=True))) for row in zip(*fields, strict=True)]
        places, arrivals = columns["place"].tolist(), columns["arrival"].tolist()
        for i in np.argsort(columns["arrival"]).tolist():
            if (arrived := arrivals[i]) >= 0:
                self.arrivals = arrived
                self._store(ids[places[i]], entries[places[i]], responses[i].tokens.tobytes(), responses[i])
        for entry, newest in zip(entries, _parts("newest", columns), strict=True):
            entry.newest = [responses[i] for i in newest]
        self.recent = OrderedDict.fromkeys(columns["recent"].tolist())
        self.arrived = set(columns["arrived"].tolist())
        self.repeated = state["repeated"]


def _joined(name: str, arrays: list, dtype: type) -> dict[str, np.ndarray]:
    """Arrays one after another in a column, and a column of their lengths: -1 where there is none."""
    lengths = np.array([-1 if array is None else len(array) for array in arrays], np.int64)
    there: list[np.ndarray] = [np.asarray(array, dtype) for array in arrays if array is not None]
    return {name: np.concatenate([np.empty(0, dtype), *there]), f"{name}.lengths": lengths}


def _parts(name: str, columns: dict[str, np.ndarray]) -> list[np.ndarray | None]:
    """What `_joined` joined; copies, so that one that leaves gives its memory back."""
    lengths = columns[f"{name}.lengths"]
    ends = np.maximum(lengths, 0).cumsum().tolist()
    whole = columns[name]
    return [
        None if length < 0 else whole[end - length : end].copy()
        for length, end in zip(lengths.tolist(), ends, strict=True)
    ]
