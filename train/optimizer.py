"""Optimisers, by what they hold of a model of N weights: its weights, gradients and moments.

    adamw        fp32 weights, AdamW in fp32                                                16 N bytes
    adamw_bf16   bf16 weights, moments in bf16; rounded stochastically, or small steps      8 N bytes
                 would be lost (https://arxiv.org/abs/2010.06192)
    adamw_8bit   the same with moments of 8 bits (https://arxiv.org/abs/2110.02861)         6 N bytes

The latter two are torchao's.
"""

import re

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def weights_dtype(name: str) -> torch.dtype:
    """The dtype of the weights that an optimiser updates."""
    return torch.float32 if name == "adamw" else torch.bfloat16


def make_optimizer(name: str, weights: list[nn.Parameter]) -> Optimizer:
    """An optimiser without weight decay; `take_step` sets its learning rate."""
    if name == "adamw":
        return torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True)
    from torchao.optim import AdamW8bit, _AdamW

    kind = AdamW8bit if name == "adamw_8bit" else _AdamW
    return kind(weights, lr=0.0, weight_decay=0.0, bf16_stochastic_round=True)


def take_step(optimizer: Optimizer, lr: float, finite: Tensor) -> None:
    """Take one step, or none where `finite`, a truth value on the device, is false.

    torch's own optimiser reads it on the device; for torchao's the host waits for it.
    """
    (group,) = optimizer.param_groups
    if isinstance(optimizer, torch.optim.AdamW):
        group["lr"] = lr
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        group["lr"].fill_(lr)
        optimizer.step()


def forget_half_made_state(optimizer: Optimizer) -> None:
    """Drop the state of weights whose first step came to nothing, for lack of memory."""
    for weight in [weight for weight, state in optimizer.state.items() if len(state) < 3]:
        del optimizer.state[weight]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: the text is the driver's, cuBLAS's or cuDNN's, which torch's compiler hands on in errors
    of its own. (A Triton kernel that is "out of resource" lacks shared memory.)"""
    return bool(re.search("out of memory|can't allocate memory|_ALLOC(ATION)?_FAILED", str(error)))
