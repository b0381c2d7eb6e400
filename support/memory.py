"""Bytes: what tensors take on this rank, what a forward keeps for its backward, what will fit."""

import dataclasses
import itertools
from dataclasses import dataclass

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


# --------------------------------------------------------------------------------------------------
# Will it fit?


GIB = 2**30


RUNTIME = 4 * GIB  # CUDA's context, NCCL, and what a sleeping vLLM keeps


VLLM_LEAST = 4 * GIB  # cache and activations, beside its weights


MOST_OF_A_GPU = 0.95  # the rest is lost between blocks


@dataclass(frozen=True)
class ModelSize:
    """The counts of a model that decide what it takes."""

    parameters: int
    vision: int  # of them, in tower and projector
    embeddings: int  # of them, in embedding and head: whole on every GPU during a pass
    layers: int  # of the language model
    hidden: int  # its width


def gpu_bytes(size: ModelSize, s, shards: int) -> tuple[float, float]:
    """Bytes on each GPU (while learning, beside the sampler while sampling), without having run.

    Within 15 % of what torch's MemTracker measured under FSDP2 on Qwen2.5-VL of 3B and 7B.
    Adapters of LoRA count as nothing.

    Args:
        s: the Settings of a run; compute is in bfloat16.
        shards: GPUs that weights, gradients and optimizer state are shared over.
    """
    language = size.parameters - size.vision
    if s.lora_rank:
        trained = 0
        frozen = 2 * language / shards + 2 * size.vision
    elif s.freeze_vision:
        trained = language
        frozen = 2 * size.vision
    else:
        trained = size.parameters
        frozen = 0
    masters = 4 * trained / shards  # float32, as gradients and each of the two moments are
    reference = 0
    if s.kl_coefficient and not s.lora_rank:
        reference = 2 * size.vision + (0 if s.reference_on_cpu else 2 * language / shards)
    resting = 3 * masters + frozen + reference + RUNTIME

    layer = (language - size.embeddings) / size.layers
    whole = 2 * (size.embeddings + layer)  # gathered while they compute
    inside = 36  # widths of activations that a token leaves in a layer
    kept = size.layers * (1 if s.gradient_checkpointing else inside) + 42
    activations = 2 * size.hidden * kept * s.max_tokens_per_pack
    return resting + masters + whole + activations, resting


def sampler_fraction(size: ModelSize, s, ranks: int, gpu: float) -> float:
    """Share of a GPU that vLLM may take while it samples: --memory_fraction, or what is left beside
    training, 0.6 at most. 0 if the run does not fit.

    Args:
        s: the Settings of a run.
        ranks: its processes, one on each GPU.
        gpu: bytes of a GPU.
    """
    learning, resting = gpu_bytes(size, s, s.shard_ranks or ranks)
    fraction = s.memory_fraction or min(0.6, MOST_OF_A_GPU - resting / gpu)
    least = 2 * size.parameters / s.rollout_tp + VLLM_LEAST
    together = max(learning, resting + fraction * gpu)
    return fraction if together <= MOST_OF_A_GPU * gpu and least <= fraction * gpu else 0.0


REMEDIES = (  # that cost least come first
    {"gradient_checkpointing": True},
    {"max_tokens_per_pack": 8192},
    {"memory_fraction": 0},
    {"rollout_tp": 4},
    {"reference_on_cpu": True},
    {"lora_rank": 16, "reference_on_cpu": False},
)


def fit(size: ModelSize, s, ranks: int, gpu: float) -> float:
    """The sampler's share of a GPU, see sampler_fraction.

    Raises:
        ValueError: it does not fit, with the flags that change this.
    """
    fraction = sampler_fraction(size, s, ranks, gpu)
    if fraction:
        return fraction
    remedy = "take more GPUs or a smaller model"
    for changes in possible_changes(s, ranks):
        if sampler_fraction(size, dataclasses.replace(s, **changes), ranks, gpu):
            flags = [f"--{name} {str(value).lower()}" for name, value in changes.items()]
            remedy = f"it fits with {' '.join(flags)}"
            break
    learning, resting = gpu_bytes(size, s, s.shard_ranks or ranks)
    weights = 2 * size.parameters / s.rollout_tp
    raise ValueError(
        f"{s.model} does not fit on {ranks} GPU(s) of {gpu / GIB:.0f} GiB: each would hold "
        f"{learning / GIB:.0f} GiB while learning, and while sampling {resting / GIB:.0f} beside "
        f"the {weights / GIB:.0f} of the sampler's weights; {remedy}"
    )


def possible_changes(s, ranks: int):
    """Settings that make a run smaller, the fewest first."""
    for count in range(1, len(REMEDIES) + 1):
        for chosen in itertools.combinations(REMEDIES, count):
            changes = {}
            for remedy in chosen:
                changes |= remedy
            new = {name: value for name, value in changes.items() if getattr(s, name) != value}
            no_reference = s.lora_rank or not s.kl_coefficient
            moves_nothing = no_reference and new.get("reference_on_cpu")
            if new and not moves_nothing and ranks % new.get("rollout_tp", 1) == 0:
                yield new
