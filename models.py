"""Frozen models that judge responses: reward models, toxicity classifiers, guards, embedders, language models.

Each lives on a search device and works in a thread of its own, so that neither generation nor training waits for it.
What coroutines ask while one batch runs makes up the next.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

BATCH_TOKENS = 16384  # in a forward pass, padding included
TEXTS = 256  # asked for together, unless one asker has more: all of them wait for the last


def load_settings(model: str, field: str):
    """(config, tokenizer) of a model.

    Raises:
        ValueError: there is no such model; names the field that asked for it.
    """
    from transformers import AutoConfig, AutoTokenizer

    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ValueError(f"{field} is {model!r}: it must be a Hugging Face folder or hub id, and is no folder")
    if model == "embedded":
        raise ValueError(f"{field} is 'embedded', which only Countdown has: it must be a Hugging Face folder or hub id")
    try:
        return tuple(each.from_pretrained(model, trust_remote_code=False) for each in (AutoConfig, AutoTokenizer))
    except Exception as error:  # transformers lets through what its parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{field} is {model!r}: it must be a Hugging Face folder or hub id ({reason})") from None


class Frozen:
    """A model that gives an array for each of what it is asked: `await model(texts)`, after `await model.load(...)`.

    Args:
        model: a Hugging Face folder or hub id. Only its config and tokenizer are read here.
        field: the setting that named it, for messages.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """

    kind = "AutoModel"  # the class of transformers that loads it
    special = True  # whether the tokenizer adds its special tokens

    def __init__(self, model: str, field: str):
        self.name, self.field = model, field
        self.settings, self.tokenizer = load_settings(model, field)
        positions = getattr(self.settings, "max_position_embeddings", None) or 2**20
        self.longest = min(positions - 2, self.tokenizer.model_max_length)  # RoBERTa counts positions from 2
        self.thread: ThreadPoolExecutor | None = None
        self.ending = False
        self.waiting: deque[tuple[Sequence, asyncio.Future]] = deque()
        self.working: asyncio.Task | None = None

    async def load(self, device: str, cores: set[int]) -> None:
        """Load the weights.

        Args:
            device: where.
            cores: the CPU cores to compute on.
        """
        from machine import pin

        self.thread = ThreadPoolExecutor(1, self.field, pin, (cores,))
        await asyncio.get_running_loop().run_in_executor(self.thread, self._load, device)

    async def __call__(self, texts: Sequence) -> list[np.ndarray]:
        """An array for each text."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((texts, future))
        if self.working is None:
            self.working = asyncio.create_task(self._work())
        return await future

    def encode(self, texts: Sequence) -> Sequence[Collection[int]]:
        """The token ids of each text."""
        return self.tokenizer(
            texts, truncation=True, max_length=self.longest, add_special_tokens=self.special
        ).input_ids

    def forward(self, rows, mask):
        """A tensor for each row [B, ...]; of token ids [B, T], padded on the right, and the mask of the rest."""
        raise NotImplementedError

    def end(self) -> None:
        """Let the forward pass under way end; no other is begun."""
        self.ending = True
        if self.thread:
            self.thread.shutdown(cancel_futures=True)

    async def _work(self) -> None:
        while self.waiting:
            batch: list[tuple[Sequence, asyncio.Future]] = []
            while self.waiting and sum(len(texts) for texts, _ in batch) < TEXTS:
                request = self.waiting.popleft()
                if not request[1].done():  # else nobody waits any more
                    batch.append(request)
            texts = [text for texts, _ in batch for text in texts]
            try:
                values = await asyncio.get_running_loop().run_in_executor(self.thread, self._compute, texts)
            except Exception as error:
                outcomes: Iterable = itertools.repeat(error)
            else:
                arrays = iter(values)
                outcomes = [list(itertools.islice(arrays, len(texts))) for texts, _ in batch]
            for (_, future), outcome in zip(batch, outcomes, strict=False):
                if not future.done():
                    (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)
        self.working = None

    def _load(self, device: str) -> None:
        import torch
        import transformers

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = getattr(transformers, self.kind).from_pretrained(self.name, dtype=dtype).to(device).eval()

    def _compute(self, texts: Sequence) -> list[np.ndarray]:
        import torch

        ids = [each if len(each) else [self.tokenizer.eos_token_id or 0] for each in self.encode(texts)]
        values: list[np.ndarray] = [None] * len(texts)
        with torch.inference_mode():
            for batch in itertools.takewhile(lambda _: not self.ending, _batches(ids)):
                # A classifier reads the last token that is not padding. Where that is padded with the end-of-sequence
                # token it would not see the end of a text: so pad with what none of these texts has.
                padding = next(i for i in itertools.count() if not any(i in ids[b] for b in batch))
                self.model.config.pad_token_id = padding
                rows = torch.full((len(batch), max(len(ids[b]) for b in batch)), padding)
                mask = torch.zeros_like(rows)
                for row, b in enumerate(batch):
                    rows[row, : len(ids[b])], mask[row, : len(ids[b])] = torch.as_tensor(ids[b]), 1
                each = self.forward(rows.to(self.model.device), mask.to(self.model.device)).float().cpu().numpy()
                for b, value in zip(batch, each, strict=True):
                    values[b] = value
        return values


def _batches(ids: Sequence[Collection[int]]) -> Iterator[list[int]]:
    """Indices of rows alike in length, together at most `BATCH_TOKENS` with the padding."""
    left = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    while left:
        fit = max(1, BATCH_TOKENS // max(1, len(ids[left[0]])))
        yield left[:fit]
        left = left[fit:]


def plain(text: str, tokenizer) -> str:
    """A text without what the tokenizer would read as a special token, which a model may spell out to deceive another.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(all_special_tokens=["</s>"], added_tokens_decoder={})
    >>> plain("so </</s>s> it ends</s>", tokenizer)
    'so  it ends'
    """
    special = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    while found := [token for token in special if token in text]:
        for token in found:
            text = text.replace(token, "")
    return text


def classifies(settings) -> bool:
    """Whether a model of this config has a head that classifies sequences."""
    return any(each.endswith("ForSequenceClassification") for each in settings.architectures or [])


class SequenceClassifier(Frozen):
    """A model with a head for classification."""

    kind = "AutoModelForSequenceClassification"

    def __init__(self, model: str, field: str):
        super().__init__(model, field)
        if not classifies(self.settings):  # transformers would give it a random head
            kind = next(iter(self.settings.architectures or []), "unknown")
            raise ValueError(f"{field} is {model!r}: it must be a sequence classifier, and is a {kind}")


class RewardModel(SequenceClassifier):
    """The score of a text: a sequence classifier with one label."""

    def __init__(self, model: str, field: str):
        super().__init__(model, field)
        self.tokenizer.truncation_side = "left"  # what is judged stands at the end
        if self.settings.num_labels != 1:
            raise ValueError(
                f"{field} is {model!r}: a reward model has one label, and it has {self.settings.num_labels}"
            )

    def forward(self, rows, mask):
        return self.model(input_ids=rows, attention_mask=mask).logits[:, 0]


class Classifier(SequenceClassifier):
    """log P(label) of a text.

    Args:
        label: by the name that the model has for it.
    """

    def __init__(self, model: str, field: str, label: str):
        super().__init__(model, field)
        labels = list(self.settings.id2label.values())
        if label not in labels:
            raise ValueError(f"{field} is {model!r}: it has no label {label!r} but {', '.join(labels)}")
        self.index = labels.index(label)

    def text(self, user: str, assistant: str) -> str:
        """What it reads of a conversation: the answer."""
        return assistant

    def forward(self, rows, mask):
        return self.model(input_ids=rows, attention_mask=mask).logits.float().log_softmax(-1)[:, self.index]


class Guard(Frozen):
    """log P(unsafe) of a conversation as the model's chat template has it: a model that answers "safe" or "unsafe".

    Args:
        opening: what it writes before that word.
    """

    kind = "AutoModelForCausalLM"
    special = False  # the chat template writes them

    def __init__(self, model: str, field: str, opening: str):
        super().__init__(model, field)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{field} is {model!r}: a guard needs a chat template, and it has none")
        self.opening, *answers = (
            self.tokenizer(opening + word, add_special_tokens=False).input_ids for word in ("", "safe", "unsafe")
        )
        begin = len(self.opening)
        if any(ids[:begin] != self.opening for ids in answers) or answers[0][begin] == answers[1][begin]:
            raise ValueError(f"{field} is {model!r}: it does not tell safe and unsafe apart after {opening!r}")
        self.answers = [ids[begin] for ids in answers]
        self.tokenizer.truncation_side = "left"
        self.longest -= begin

    def text(self, user: str, assistant: str) -> str:
        """A conversation as the guard's chat template has it."""
        turns = {"user": plain(user, self.tokenizer), "assistant": plain(assistant, self.tokenizer)}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, *self.opening] for ids in super().encode(texts)]

    def forward(self, rows, mask):
        import torch

        hidden = self.model.base_model(input_ids=rows, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows), device=rows.device), mask.sum(1) - 1]
        return self.model.get_output_embeddings()(last).float()[:, self.answers].log_softmax(-1)[:, 1]


class Embedder(Frozen):
    """The embedding of a text, of length 1: the mean of the last hidden states, as sentence-transformers has it."""

    def forward(self, rows, mask):
        import torch

        hidden = self.model(input_ids=rows, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)


class LanguageModel(Frozen):
    """Log-probability of each token but the first of a sequence of token ids, at some temperatures
    [T, number of temperatures], 0 in the padding behind it."""

    kind = "AutoModelForCausalLM"

    def __init__(self, model: str, field: str, temperatures: Sequence[float]):
        super().__init__(model, field)
        self.temperatures = temperatures

    def encode(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(texts)

    def forward(self, rows, mask):
        import torch

        from trainer import token_logprobs

        hidden = self.model.base_model(input_ids=rows, attention_mask=mask).last_hidden_state[:, :-1]
        head, known = self.model.get_output_embeddings(), mask[:, 1:].bool()
        each = [token_logprobs(head, hidden[known], rows[:, 1:][known], t)[0] for t in self.temperatures]
        padded = torch.zeros(*known.shape, len(each), device=rows.device)
        padded[known] = torch.stack(each, dim=-1)
        return padded
