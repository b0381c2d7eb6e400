"""Bytes: what tensors take on this rank, and what a forward pass keeps for its backward."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts what forward passes `with saved:` keep for their backward, weights aside; `bytes` is
    the most of any."""

    def __init__(self):
        super().__init__(self._note, lambda tensor: tensor)
        self.bytes = 0
        self.sizes = {}  # bytes by address: several saved tensors may be views of one memory

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.bytes = max(self.bytes, sum(self.sizes.values()))
        self.sizes = {}

    def _note(self, tensor: Tensor) -> Tensor:
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not is_weight:
            memory = tensor.untyped_storage()
            self.sizes[memory.data_ptr()] = memory.nbytes()
        return tensor


def local_bytes(tensors) -> int:
    """Bytes of tensors on this rank, of sharded ones the own shard."""
    total = 0
    for tensor in tensors:
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total += shard.numel() * shard.element_size()
    return total
