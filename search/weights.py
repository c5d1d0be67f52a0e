"""How weights cross from the trainer to the engines.

One flat staging tensor holds a copy of the policy's weights. The engines open it once: as CUDA IPC memory on the
trainer's GPU, or as shared memory of the host. A sync is then one copy by the trainer (`StagedWeights.write`) and one
call to each engine (`Worker.load_weights`), with no serialisation and no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # registers CUDA tensors with ForkingPickler
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats a token, on average: rounding stays far below


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a model's weights as in a checkpoint; tied weights come under each of their names."""
    return model.named_parameters(remove_duplicate=False)


class StagedWeights:
    """A copy of a model's weights that other processes can read.

    Args:
        model: whose weights.
        devices: of the engines. On the trainer's GPU the copy stays there where all of them are this machine's GPUs.
    """

    def __init__(self, model: nn.Module, devices: Sequence[str]):
        self.weights = dict(named_weights(model))
        gpus, here = ["cpu" not in device for device in devices], not any("ray" in device for device in devices)
        self.dtype = torch.bfloat16 if all(gpus) else torch.float32
        rounded = any(gpus) or torch.bfloat16 in {weight.dtype for weight in self.weights.values()}
        self.tolerance = TOLERANCE[torch.bfloat16 if rounded else torch.float32]
        self.version = 0  # the trainer's step that the copy is of
        self.allocate(all(gpus) and here and next(model.parameters()).is_cuda)

    def allocate(self, share_cuda: bool) -> None:
        """Allocate the copy, on the model's GPU or in host memory, and the handle by which other processes open it."""
        size = sum(weight.numel() for weight in self.weights.values())
        layout = [(name, list(weight.shape)) for name, weight in self.weights.items()]
        self.handle: dict = {"dtype": str(self.dtype).removeprefix("torch."), "size": size, "layout": layout}
        if share_cuda:
            self.flat = torch.empty(size, dtype=self.dtype, device=next(iter(self.weights.values())).device)
            self.handle["ipc"] = bytes(ForkingPickler.dumps(self.flat))
        else:  # memory without a name: it is freed when the last process that has it open ends, however that ends
            self.memory = os.memfd_create("tba-weights")
            os.truncate(self.memory, size * self.dtype.itemsize)
            self.handle["path"] = f"/proc/{os.getpid()}/fd/{self.memory}"
            self.flat = open_flat(self.handle)
        self.views = dict(views_of(self.flat, layout))
        self.stream = torch.cuda.Stream(self.flat.device) if share_cuda else None

    @torch.no_grad()
    def write(self, version: int) -> None:
        """Copy the model's weights. On CUDA the copy runs on a stream of its own: see `wait`."""
        self.version = version
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.flat.device))
        with torch.cuda.stream(self.stream):
            for name, weight in self.weights.items():
                self.views[name].copy_(weight, non_blocking=self.stream is not None)

    def wait_before_update(self) -> None:
        """Order the GPU's next work, a change of the weights, behind a copy that is under way."""
        if self.stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Wait until the last `write` is done."""
        if self.stream is not None:
            self.stream.synchronize()


def open_flat(handle: dict) -> Tensor:
    """The staging tensor, opened by its handle."""
    if "ipc" in handle:  # a pickle, but of the program's own, through a pipe that nobody else has
        return ForkingPickler.loads(handle["ipc"])
    if "array" in handle:  # which is in Ray's object store
        return torch.from_numpy(handle["array"]).view(getattr(torch, handle["dtype"]))
    return torch.from_file(handle["path"], shared=True, size=handle["size"], dtype=getattr(torch, handle["dtype"]))


def views_of(flat: Tensor, layout: list[tuple[str, list[int]]]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of each weight in a staging tensor."""
    start = 0
    for name, shape in layout:
        end = start + torch.Size(shape).numel()
        yield name, flat[start:end].view(shape)
        start = end
