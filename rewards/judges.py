"""Frozen models that score responses: reward models, toxicity classifiers, guards, embedders, language models.

Each lives on a device and computes in a thread of its own, so that neither generation nor training waits for it.
Requests that arrive during one batch make up the next.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from search.process import pin_thread

log = logging.getLogger("tba")

BATCH_TOKENS = 16384  # in a forward pass, padding included
MAX_TEXTS = 256  # in a batch of several requests, each of which waits for all of it; one request may have more


def load_config_and_tokenizer(model: str, field: str) -> tuple[Any, Any]:
    """The config and the tokenizer of a Hugging Face folder or hub id.

    Raises:
        ValueError: there is no such model; names the setting that asks for it.
    """
    from transformers import AutoConfig, AutoTokenizer

    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ValueError(f"{field} is {model!r}: it must be a Hugging Face folder or hub id, and is no folder")
    if model == "embedded":
        raise ValueError(f"{field} is 'embedded', which only Countdown has: it must be a Hugging Face folder or hub id")
    try:
        safe = {"trust_remote_code": False}
        return AutoConfig.from_pretrained(model, **safe), AutoTokenizer.from_pretrained(model, **safe)
    except Exception as error:  # transformers lets through what its parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{field} is {model!r}: it must be a Hugging Face folder or hub id ({reason})") from None


class Judge:
    """A model that returns an array for each input: `await judge(texts)`, while it is `loaded`.

    Args:
        model: a Hugging Face folder or hub id. Only its config and tokenizer are read here.
        field: the setting that named it, for messages.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """

    auto_class = "AutoModel"  # of transformers
    add_special_tokens = True

    def __init__(self, model: str, field: str):
        self.name, self.field = model, field
        self.config, self.tokenizer = load_config_and_tokenizer(model, field)
        positions = getattr(self.config, "max_position_embeddings", None) or 2**20
        self.max_length = min(positions - 2, self.tokenizer.model_max_length)  # RoBERTa counts positions from 2
        self.queue: asyncio.Queue[tuple[Sequence, asyncio.Future]] = asyncio.Queue()
        self.ending = False
        self.there: Any = None  # the `RemoteJudge` that has it on a cluster

    @contextlib.asynccontextmanager
    async def loaded(self, device: str, cores: set[int]) -> AsyncIterator[None]:
        """Load the weights on a device (ray:1: of a cluster) and score what is asked, until the context is left.

        Then the forward pass under way ends, and no other begins.
        """
        thread = ThreadPoolExecutor(1, self.field, pin_thread, (cores,))
        try:
            log.info(f"loading {self.name} on {device} ...")
            await asyncio.get_running_loop().run_in_executor(thread, self._load, device)
            working = asyncio.create_task(self._work(thread))
            try:
                yield
            finally:
                working.cancel()
        finally:
            self.ending = True
            thread.shutdown(cancel_futures=True)
            if self.there:
                self.there.end()

    async def __call__(self, texts: Sequence) -> list[np.ndarray]:
        """An array for each text."""
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((texts, future))
        return await future

    def encode(self, texts: Sequence) -> Sequence[Collection[int]]:
        """The token ids of each text."""
        options = dict(truncation=True, max_length=self.max_length, add_special_tokens=self.add_special_tokens)
        return self.tokenizer(texts, **options).input_ids

    def forward(self, tokens, mask):
        """A tensor for each row [B, ...] of token ids [B, T], which are padded on the right: mask [B, T] is 0 there."""
        raise NotImplementedError

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while True:
            requests = [await self.queue.get()]
            while not self.queue.empty() and sum(len(texts) for texts, _ in requests) < MAX_TEXTS:
                requests.append(self.queue.get_nowait())
            requests = [(texts, future) for texts, future in requests if not future.done()]  # else it was cancelled
            batch = [text for texts, _ in requests for text in texts]
            try:
                values = iter(await asyncio.get_running_loop().run_in_executor(thread, self._compute, batch))
            except Exception as error:
                for _, future in requests:
                    if not future.done():
                        future.set_exception(error)
                continue
            for texts, future in requests:
                result = list(itertools.islice(values, len(texts)))
                if not future.done():
                    future.set_result(result)

    def _load(self, device: str) -> None:
        if device.startswith("ray:"):
            from search.cluster import RemoteJudge

            self.there = RemoteJudge(self, device)
            self.there.load()
            vars(self)["_compute"] = self.there.compute  # in place of its own
            return
        import torch
        import transformers

        from train.model import dense_attention

        on_gpu = device.startswith("cuda")
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # else it would wait for the trainer's updates
        load, dtype = getattr(transformers, self.auto_class).from_pretrained, (torch.float32, torch.bfloat16)[on_gpu]
        with torch.cuda.stream(self.stream):
            self.model = load(self.name, dtype=dtype).to(device).eval()
        if dense_attention(self.model) == "eager":  # Gemma 2, of which guards and reward models are made
            self.model.set_attn_implementation("eager")

    def _compute(self, texts: Sequence) -> list[np.ndarray]:
        import torch

        ids = [each if len(each) else [self.tokenizer.eos_token_id or 0] for each in self.encode(texts)]
        values: list[np.ndarray] = [None] * len(texts)
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            for batch in itertools.takewhile(lambda _: not self.ending, _batches(ids)):
                # A classifier reads the last token that is not padding. Where that is padded with the end-of-sequence
                # token it would not see the end of a text: so pad with what none of these texts has.
                padding = next(i for i in itertools.count() if not any(i in ids[b] for b in batch))
                self.model.config.pad_token_id = padding
                tokens = torch.full((len(batch), max(len(ids[b]) for b in batch)), padding)
                mask = torch.zeros_like(tokens)
                for row, b in enumerate(batch):
                    tokens[row, : len(ids[b])], mask[row, : len(ids[b])] = torch.as_tensor(ids[b]), 1
                results = self.forward(tokens.to(self.model.device), mask.to(self.model.device)).float().cpu().numpy()
                for b, result in zip(batch, results, strict=True):
                    values[b] = result
        return values


def _batches(ids: Sequence[Collection[int]]) -> Iterator[list[int]]:
    """Indices of rows alike in length, together at most `BATCH_TOKENS` with the padding."""
    remaining = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    while remaining:
        fit = max(1, BATCH_TOKENS // max(1, len(ids[remaining[0]])))
        yield remaining[:fit]
        remaining = remaining[fit:]


def strip_special_tokens(text: str, tokenizer) -> str:
    """A text without what the tokenizer would read as a special token, which a model may spell out to deceive another.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(all_special_tokens=["</s>"], added_tokens_decoder={})
    >>> strip_special_tokens("so </</s>s> it ends</s>", tokenizer)
    'so  it ends'
    """
    special = {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
    while present := [token for token in special if token in text]:
        for token in present:
            text = text.replace(token, "")
    return text


def special_tokens_behind(tokenizer) -> int:
    """How many special tokens a tokenizer puts behind a text: 1 where it was saved with `add_eos_token`."""
    text, whole = (tokenizer("1", add_special_tokens=special).input_ids for special in (False, True))
    more = len(whole) - len(text)
    return next((n for n in range(more + 1) if whole[more - n : len(whole) - n] == text), 0)


def is_classifier(config) -> bool:
    """Whether a model of this config has a head that classifies sequences."""
    return any(each.endswith("ForSequenceClassification") for each in config.architectures or [])


class SequenceClassifier(Judge):
    """A model with a head for classification."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, model: str, field: str):
        super().__init__(model, field)
        if not is_classifier(self.config):  # transformers would give it a random head
            kind = next(iter(self.config.architectures or []), "unknown")
            raise ValueError(f"{field} is {model!r}: it must be a sequence classifier, and is a {kind}")


class RewardModel(SequenceClassifier):
    """The score of a text: a sequence classifier with one label."""

    def __init__(self, model: str, field: str):
        super().__init__(model, field)
        self.tokenizer.truncation_side = "left"  # the response stands at the end
        if self.config.num_labels != 1:
            raise ValueError(f"{field} is {model!r}: a reward model has one label, and it has {self.config.num_labels}")

    def forward(self, tokens, mask):
        return self.model(input_ids=tokens, attention_mask=mask).logits[:, 0]


class Classifier(SequenceClassifier):
    """log P(label) of a text.

    Args:
        label: one of the model's labels.
    """

    def __init__(self, model: str, field: str, label: str):
        super().__init__(model, field)
        labels = list(self.config.id2label.values())
        if label not in labels:
            raise ValueError(f"{field} is {model!r}: it has no label {label!r} but {', '.join(labels)}")
        self.index = labels.index(label)

    def text(self, user: str, assistant: str) -> str:
        """The part of a conversation that it reads: the answer."""
        return assistant

    def forward(self, tokens, mask):
        return self.model(input_ids=tokens, attention_mask=mask).logits.float().log_softmax(-1)[:, self.index]


class Guard(Judge):
    """log P(unsafe) of a conversation in the model's chat template: a language model that answers "safe" or "unsafe".

    Args:
        opening: text that it writes before that word.
    """

    auto_class = "AutoModelForCausalLM"
    add_special_tokens = False  # the chat template writes them

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
        self.max_length -= begin

    def text(self, user: str, assistant: str) -> str:
        """A conversation in the guard's chat template."""
        turns = {"user": user, "assistant": assistant}
        messages = [{"role": r, "content": strip_special_tokens(text, self.tokenizer)} for r, text in turns.items()]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*ids, *self.opening] for ids in super().encode(texts)]

    def forward(self, tokens, mask):
        import torch

        from train.model import head

        hidden = self.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]
        return head(self.model)(last).float()[:, self.answers].log_softmax(-1)[:, 1]


class Embedder(Judge):
    """The embedding of a text, of length 1: the mean of the last hidden states, as in sentence-transformers."""

    def forward(self, tokens, mask):
        import torch

        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)


class LanguageModel(Judge):
    """Log-probabilities of token ids [T], of each but the first: [T - 1, temperatures]; further rows are 0.

    Args:
        temperatures: by which logits are divided, one after the other.
    """

    auto_class = "AutoModelForCausalLM"

    def __init__(self, model: str, field: str, temperatures: Sequence[float]):
        super().__init__(model, field)
        self.temperatures = temperatures

    def encode(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(texts)

    def forward(self, tokens, mask):
        import torch

        from train.model import token_logprobs

        hidden = self.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, :-1]
        present = mask[:, 1:].bool()
        targets = tokens[:, 1:][present]
        logprobs = [token_logprobs(self.model, hidden[present], targets, t)[0] for t in self.temperatures]
        padded = torch.zeros(*present.shape, len(logprobs), device=tokens.device)
        padded[present] = torch.stack(logprobs, dim=-1)
        return padded
