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


class Pending(HostCopy):
    """The figures of an update by their names: on CUDA they arrive when it is done."""

    def __init__(self, figures: dict[str, Tensor]):
        super().__init__(torch.stack(list(figures.values())))
        self.names = list(figures)

    def result(self) -> dict[str, float]:
        """The figures; waits for them."""
        return dict(zip(self.names, self.numpy().tolist(), strict=True))
