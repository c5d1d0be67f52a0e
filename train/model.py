"""Models of the trainer: how they are loaded, and log-probabilities of the tokens that they read."""

import contextlib
import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK = 2**26  # logits at a time, 256 MiB of fp32: [tokens, vocabulary] of a whole micro-batch is never built


def load_model(model: str | Path | PreTrainedConfig, dtype: torch.dtype, kind: str) -> PreTrainedModel:
    """A model in evaluation mode, on the host: with flex attention for a device of the kind "cuda" where its
    architecture has it, else with torch's own."""
    from_config = isinstance(model, PreTrainedConfig)
    load = AutoModelForCausalLM.from_config if from_config else AutoModelForCausalLM.from_pretrained
    if kind == "cuda":
        with contextlib.suppress(ValueError):  # GPT-2, for one, does not have it
            return load(model, dtype=dtype, attn_implementation="flex_attention").eval()
    loaded = load(model, dtype=dtype, attn_implementation="sdpa").eval()  # no dropout: a response has one probability
    loaded.set_attn_implementation(dense_attention(loaded))
    return loaded


def dense_attention(model: PreTrainedModel) -> str:
    """What computes a model's attention where that is not flex attention: torch's own, which cannot soft-cap scores.

    "sdpa" by another name, for which transformers makes no mask: rows without one are causal as they are. It would look
    for packed sequences in them, and the host wait for all that the GPU has to do.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    return "sdpa_without_mask" if model._can_set_attn_implementation() else "sdpa"  # Falcon's own cannot be named


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A model's decoder layers, which architectures name differently: its longest list of modules."""
    return max((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)


class _States(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:  # such as cross_attentions, which some have beside
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """In the place of a model's layers: their hidden states are given."""

    def forward(self, *_, inputs_embeds: Tensor, **__) -> _States:
        return _States(last_hidden_state=inputs_embeds)

    decoder = forward  # OPT calls them by this name


def head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From hidden states [N, H] to logits [N, V] as the model's own forward has them: Cohere and Granite scale what its
    last layer gives, Gemma 2 soft-caps it. Under autocast its weights are cast here, once for all calls."""
    alone, output, device = object.__new__(type(model)), model.get_output_embeddings(), model.device.type
    cast = copy.copy(output)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype, weights = torch.get_autocast_dtype(device), output.named_parameters(recurse=False)
        cast._parameters = output._parameters | {name: weight.to(dtype) for name, weight in weights}
    modules = {name: cast if module is output else module for name, module in model._modules.items()}
    alone.__dict__ = model.__dict__ | {"_modules": modules | {model.base_model_prefix: _Given()}}
    return lambda hidden_NH: alone.forward(inputs_embeds=hidden_NH[None], use_cache=False).logits[0]


def token_logprobs(
    model: PreTrainedModel,
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature: float,
    early_N: Tensor | None = None,
    end_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution [N], in fp32 or better, in nats.

    In chunks of `CHUNK` logits. Where there are several, each is recomputed in the backward pass. Where `early_N` is
    true, none of `end_tokens` could be sampled.
    """

    def of_chunk(hidden: Tensor, target: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = logits_of(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if early is not None:
            impossible = torch.zeros_like(logits, dtype=torch.bool)
            impossible[:, end_tokens] = early[:, None]
            logits = logits.masked_fill(impossible, torch.finfo(logits.dtype).min)
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
        return logits.gather(-1, target[:, None])[:, 0] - log_z, entropy

    logits_of, size = head(model), max(1, CHUNK // model.get_output_embeddings().weight.shape[0])
    if len(target_N) <= size:
        return of_chunk(hidden_NH, target_N, early_N)
    early = itertools.repeat(None) if early_N is None else early_N.split(size)
    chunks = zip(hidden_NH.split(size), target_N.split(size), early, strict=False)
    results = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat([logprob for logprob, _ in results]), torch.cat([entropy for _, entropy in results])
