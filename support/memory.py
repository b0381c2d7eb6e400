"""Bytes: what tensors take on this rank, and what a forward pass keeps for its backward."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts what forward passes `with saved:` keep for their backward, weights aside; `bytes` is
    the most of any."""

    def __init__(self):
        super().__init__(self._note, lambda tensor: tensor)
        self.bytes, self.sizes = (
            0,
            {},
        )  # bytes by address: several saved tensors may be views of one memory

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.bytes, self.sizes = max(self.bytes, sum(self.sizes.values())), {}

    def _note(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            memory = tensor.untyped_storage()
            self.sizes[memory.data_ptr()] = memory.nbytes()
        return tensor


def local_bytes(tensors) -> int:
    """Bytes of tensors on this rank, of sharded ones the own shard."""
    own = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in own)
