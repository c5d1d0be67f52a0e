"""Optimisers: of a small step of bf16 weights nothing is lost, and a state that was saved goes on to the bit."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError
from torch.optim import Optimizer

from config import Config, OneOf
from run.check import limits
from train.optimizer import forget_half_made_state, make_optimizer, out_of_memory, take_step, weights_dtype

every_optimizer = pytest.mark.parametrize("name", limits(Config)["optimizer"][OneOf])


def made(name: str) -> tuple[nn.Parameter, Optimizer]:
    """A weight, large enough that its moments are quantised, and its optimiser."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(64, 64, dtype=weights_dtype(name)))
    return weight, make_optimizer(name, [weight])


def step(weight: nn.Parameter, optimizer: Optimizer, seed: int, lr: float = 1e-4, finite: bool = True) -> None:
    torch.manual_seed(seed)
    weight.grad = torch.rand(64, 64).to(weight.dtype) + 1
    take_step(optimizer, lr, torch.tensor(finite))


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every plain tensor of its state, those inside quantised moments by themselves."""
    tensors = {}
    for weight, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():
            inner = tensor.__tensor_flatten__()[0] if type(tensor) is not Tensor else []
            tensors |= {f"{weight}.{name}.{each}": getattr(tensor, each).clone() for each in inner}
            tensors |= {} if inner else {f"{weight}.{name}": tensor.clone()}
    return tensors


@every_optimizer
def test_steps_that_are_small_beside_the_weight_add_up(name):
    """A bf16 number near 1 is 0.004 from the next: rounded to the nearest, no step of 0.0001 would change it."""
    weight, optimizer = made(name)
    for seed in range(60):
        step(weight, optimizer, seed)
    assert weight.float().mean().item() == pytest.approx(1 - 60 * 1e-4, abs=5e-4)


@every_optimizer
def test_a_step_that_is_not_finite_is_not_taken(name):
    weight, optimizer = made(name)
    step(weight, optimizer, seed=0)
    before, state = weight.detach().clone(), state_tensors(optimizer)
    step(weight, optimizer, seed=1, finite=False)
    torch.testing.assert_close((weight.detach(), state_tensors(optimizer)), (before, state), atol=0, rtol=0)
    step(weight, optimizer, seed=1)
    assert not torch.equal(weight, before)


@every_optimizer
def test_moments_take_the_memory_that_they_should(name):
    weight, optimizer = made(name)
    step(weight, optimizer, seed=0)
    moments = [each for key, each in state_tensors(optimizer).items() if "exp_avg" in key and "qmap" not in key]
    size = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}[name]
    assert sum(tensor.numel() * tensor.itemsize for tensor in moments) == size * weight.numel()


@every_optimizer
def test_a_saved_state_goes_on_to_the_bit(name):
    """It is no pickle that could run code."""
    weight, optimizer = made(name)
    for seed in range(3):
        step(weight, optimizer, seed, lr=1e-2)
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    other, resumed = made(name)
    other.data.copy_(weight)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(state_tensors(resumed), state_tensors(optimizer), atol=0, rtol=0)
    for seed in (8, 9):
        for each in ((weight, optimizer), (other, resumed)):
            step(*each, seed=seed, lr=1e-2)
    torch.testing.assert_close(other, weight, atol=0, rtol=0)
    torch.testing.assert_close(state_tensors(resumed), state_tensors(optimizer), atol=0, rtol=0)


@every_optimizer
def test_of_half_made_state_nothing_is_left(name):
    """Where memory ran out between two moments of a weight, its next step is its first."""
    weight, optimizer = made(name)
    step(weight, optimizer, seed=0)
    first = weight.detach().clone()
    forget_half_made_state(optimizer)
    assert len(optimizer.state[weight]) == 3
    del optimizer.state[weight]["exp_avg_sq"]
    forget_half_made_state(optimizer)
    assert weight not in optimizer.state
    weight.data.fill_(1)
    step(weight, optimizer, seed=0)
    torch.testing.assert_close(weight.detach(), first, atol=0, rtol=0)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FULL, True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (InductorError(FULL, None), True),
        (BackendCompilerFailed(lambda: None, FULL, None), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error, expected):
    """An update catches RuntimeErrors, as all of these are."""
    assert isinstance(error, RuntimeError) and out_of_memory(error) == expected
