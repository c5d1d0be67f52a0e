"""Tensors between the host and a GPU, neither of which waits for the other."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor; to a GPU from pinned memory, so that the host does not wait for what the GPU is doing."""
    tensor = torch.from_numpy(values).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A tensor on its way to the host, behind all that its GPU was given before; on the CPU it is there."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach().to("cpu", non_blocking=True)  # to pinned memory
        self.arrival: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def ready(self) -> bool:
        """Whether it has arrived."""
        return self.arrival is None or self.arrival.query()

    def numpy(self) -> np.ndarray:
        """Its values; waits for them."""
        if self.arrival:
            self.arrival.synchronize()
        return self.tensor.numpy()


class Pending:
    """The figures of an update: on CUDA they arrive when it is done.

    Args:
        figures: figures that the device will have.
    """

    def __init__(self, figures: dict[str, Tensor]):
        self.names, self.copy = list(figures), HostCopy(torch.stack(list(figures.values())))

    @property
    def ready(self) -> bool:
        """Whether the update is done."""
        return self.copy.ready

    def result(self) -> dict[str, float]:
        """The figures by name; waits for them."""
        return dict(zip(self.names, self.copy.numpy().tolist(), strict=True))
