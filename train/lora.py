"""LoRA (https://arxiv.org/abs/2106.09685) by peft: the policy's weights are frozen, and an adapter of them is trained.

To the weight W [out, in] of every linear layer but the head, the adapter adds lora_alpha / lora_rank * B [out, rank] @
A [rank, in]. B is 0 at first, so that the policy starts as the model that was loaded. The model is changed in place: it
stays the Hugging Face model that it was. Its reference is itself, with the adapter switched off.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from config import Config

NAME = "default"  # peft's, for a model's only adapter
PREFIX = "base_model.model."  # in peft's files, of each weight's name
FILE = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: Config, folder: Path | None = None) -> None:
    """Add an adapter in fp32 to a model whose weights are frozen: a new one, or the one that `save_adapter` wrote."""
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights are [in, out]
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.device("meta"):  # else peft makes it in the weights' dtype, and from the process's random state
        inject_adapter_in_model(settings, model, NAME)
    random = torch.Generator().manual_seed(config.seed)
    for layer in layers_of(model):
        A, B = layer.lora_A[NAME], layer.lora_B[NAME]
        initial_A = nn.init.kaiming_uniform_(torch.empty(A.weight.shape), a=5**0.5, generator=random)
        A.weight, B.weight = (nn.Parameter(w.to(model.device)) for w in (initial_A, torch.zeros(B.weight.shape)))
    if folder:
        set_peft_model_state_dict(model, load_file(folder / FILE), NAME)


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The model computes what it did before it had an adapter."""
    for layer in layers_of(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers_of(model):
            layer.enable_adapters(True)


def layers_of(model: PreTrainedModel) -> list[LoraLayer]:
    """The layers that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a model's weights as in its checkpoint, the adapter merged in fp32; one at a time."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        layer, _, kind = name.rpartition(".base_layer.")
        if kind == "weight":
            weight = model.get_submodule(layer).get_delta_weight(NAME) + weight
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's weights by their names in peft's files."""
    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    return {PREFIX + name: weight for name, weight in weights.items()}


def save_adapter(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a model's adapter, with the weights that `adapter_weights` gave, as a folder that peft reads."""
    model.peft_config[NAME].save_pretrained(folder)
    save_file(weights, folder / FILE, metadata={"format": "pt"})
