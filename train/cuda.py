"""What only a GPU needs: compiled layers, frozen weights in bf16, and the block mask of flex attention."""

from collections.abc import Callable

import numpy as np
import torch
import torch._functorch.config
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from train.model import decoder_layers
from train.transfer import to_device


def compile_layers(model: PreTrainedModel, activation_memory_budget: float) -> None:
    """Compile each decoder layer by itself. The compiler's settings are those of the thread that calls this."""
    torch._functorch.config.activation_memory_budget = activation_memory_budget
    # All layers share the graphs of their code: by model, kind of rows, and whether there is one, a trainer's are 9. At
    # torch's own limit, 8, layers would run without being compiled, and nothing would say so.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in decoder_layers(model):
        layer.compile()


def cast_linears(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the fp32 weights of a model's linear layers to `dtype`, in place; not those that are trained.

    Under autocast it computes exactly what it did: those weights would be cast anyway, and no others are. (A model all
    in bf16 has its residual stream in bf16 too, and differs from the policy before anything is trained.)
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:  # tied, it is read as an embedding too
            for name, weight in module.named_parameters(recurse=False):
                if weight.dtype == torch.float32 and not weight.requires_grad:
                    setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return model


def block_mask(
    visible: Callable, part_T: np.ndarray, prompt_T: np.ndarray, block: int, device: torch.device
) -> BlockMask:
    """The mask `visible` of one row, by counting: `create_block_mask` would build T x T truth values. A token is of a
    part, a prompt or a response, and attends to the part that is its prompt too; parts are in ascending order."""
    blocks, parts = len(part_T) // block, part_T[-1] + 1

    def tokens(of_T: np.ndarray, counted_T: np.ndarray | None = None) -> np.ndarray:  # by block and part
        at = np.arange(len(of_T)) // block * parts + of_T
        return np.bincount(at, counted_T, blocks * parts).reshape(blocks, parts).astype(np.float32)

    keys = tokens(part_T)
    pairs = (keys + tokens(prompt_T, prompt_T != part_T)) @ keys.T  # that attend, by block: up to 128^2, so exact
    earlier = np.tri(blocks, k=-1, dtype=bool)  # the keys' block is before the queries'; on the diagonal it is partial
    full = earlier & (pairs == block**2)
    partial = earlier & (pairs > 0) & ~full | np.eye(blocks, dtype=bool)
    tables = [
        to_device(table.astype(np.int32)[None, None], device)
        for blocks_NN in (partial, full)
        for table in (blocks_NN.sum(1), np.argsort(~blocks_NN, axis=1, kind="stable"))
    ]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=block, mask_mod=visible)
