"""Optimisers for bf16 weights: nothing of a small step is lost, and what they keep goes to disk and back."""

import pytest
import torch
from torch import nn

from optimizer import OPTIMIZERS, make_optimizer, restore, state_tensors, take_step, weights_dtype


def made(name: str, value: float = 1.0) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A weight, large enough that its moments are quantised, and its optimiser."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.full((64, 64), value, dtype=weights_dtype(name)))
    return weight, make_optimizer(name, [weight])


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int, lr: float = 1e-4, finite=True) -> None:
    torch.manual_seed(seed)
    weight.grad = torch.rand(64, 64).to(weight.dtype) + 1
    take_step(optimizer, lr, torch.tensor(finite))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_that_are_small_beside_the_weight_add_up(name):
    """A bf16 number near 1 is 0.004 from the next: rounded to the nearest, no step of 0.0001 would change it."""
    weight, optimizer = made(name)
    for seed in range(60):
        step(weight, optimizer, seed)
    assert weight.float().mean().item() == pytest.approx(1 - 60 * 1e-4, abs=5e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_none(name):
    weight, optimizer = made(name)
    step(weight, optimizer, seed=0)
    before = [weight.detach().clone(), *(tensor.clone() for _, tensor in state_tensors(optimizer))]
    step(weight, optimizer, seed=1, finite=False)
    torch.testing.assert_close([weight.detach(), *(t for _, t in state_tensors(optimizer))], before, atol=0, rtol=0)
    step(weight, optimizer, seed=1)
    assert not torch.equal(weight, before[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_it_keeps_goes_to_disk_and_back(name):
    weight, optimizer = made(name)
    for seed in range(3):
        step(weight, optimizer, seed, lr=1e-2)
    kept = {key: tensor.clone() for key, tensor in state_tensors(optimizer)}
    assert all(type(tensor) is torch.Tensor for tensor in kept.values())
    moments = [tensor for key, tensor in kept.items() if "exp_avg" in key and "qmap" not in key]
    size = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}[name]
    assert sum(tensor.numel() * tensor.itemsize for tensor in moments) == size * weight.numel()
    other, resumed = made(name)
    other.data.copy_(weight)
    restore(resumed, kept)
    for each in ((weight, optimizer), (other, resumed)):
        step(*each, seed=9, lr=1e-2)
    torch.testing.assert_close(other, weight, atol=0, rtol=0)
    for key, tensor in state_tensors(resumed):
        torch.testing.assert_close(tensor, dict(state_tensors(optimizer))[key], atol=0, rtol=0)
