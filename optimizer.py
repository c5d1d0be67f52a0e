"""Optimisers, by what they hold of a model of N weights: its weights, gradients and moments.

    adamw        fp32 weights, AdamW in fp32                                                16 N bytes
    adamw_bf16   bf16 weights, moments in bf16; rounded stochastically, or small steps      8 N bytes
                 would be lost (https://arxiv.org/abs/2010.06192)
    adamw_8bit   the same with moments of 8 bits (https://arxiv.org/abs/2110.02861)         6 N bytes

The latter two are torchao's. For the state of each there is one form on disk: plain tensors, by the weight's number and
the names of what the optimiser keeps of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

OPTIMIZERS = "adamw", "adamw_bf16", "adamw_8bit"


def weights_dtype(name: str) -> torch.dtype:
    """Of the weights that it updates."""
    import torch

    return torch.float32 if name == "adamw" else torch.bfloat16


def make_optimizer(name: str, weights: list[nn.Parameter]) -> Optimizer:
    """An optimiser without weight decay; `take_step` gives it its learning rate."""
    import torch

    if name == "adamw":
        return torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0, fused=True)
    from torchao.optim import AdamW8bit, _AdamW

    kind = AdamW8bit if name == "adamw_8bit" else _AdamW
    return kind(weights, lr=0.0, weight_decay=0.0, bf16_stochastic_round=True)


def take_step(optimizer: Optimizer, lr: float, finite: Tensor) -> None:
    """One step, or none where not `finite`, a truth value on the device: torch's own optimiser asks it there, for
    torchao's the host has to wait."""
    import torch

    (group,) = optimizer.param_groups
    if isinstance(optimizer, torch.optim.AdamW):
        group["lr"] = lr
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    elif finite:
        group["lr"].fill_(lr)
        optimizer.step()


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor) of all that it keeps; quantised ones in their parts."""
    for index, weight in enumerate(optimizer.param_groups[0]["params"]):
        for name, tensor in optimizer.state.get(weight, {}).items():
            for part, plain in _parts(tensor):
                yield f"{index}.{name}{part}", plain


def restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Let it, while new, keep what `state_tensors` gave."""
    for index, weight in enumerate(optimizer.param_groups[0]["params"]):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if any(key.startswith(f"{index}.{name}") for key in tensors):
                optimizer.state[weight][name] = state = _empty(optimizer, weight, name)
                for part, plain in _parts(state):
                    plain.copy_(tensors[f"{index}.{name}{part}"])


def _parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        yield from ((f".{name}", getattr(tensor, name)) for name in names)
    else:
        yield "", tensor


def _empty(optimizer: Optimizer, weight: Tensor, name: str) -> Tensor:
    import torch

    torchs = isinstance(optimizer, torch.optim.AdamW)
    if name == "step":
        return torch.zeros((), device=weight.device if torchs else "cpu")
    return torch.zeros_like(weight) if torchs else optimizer._new_buffer(weight.detach(), name == "exp_avg")
