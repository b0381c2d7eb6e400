"""The processes of a run: start them, let them exchange objects and sums, print on one of them."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def start_processes(timeout: float = 30.0) -> torch.device:
    """Join the other ranks of torchrun; without torchrun, be the only one. Returns this rank's
    device.

    A rank that waits for another longer than `timeout`, in minutes, gives up, and the run ends.
    """
    store, rank, world, limit = dist.HashStore(), 0, 1, datetime.timedelta(minutes=timeout)
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store when it restarts the ranks, and with it the addresses of the
            # dead ones
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    options = dict(store=store, rank=rank, world_size=world, timeout=limit)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **options)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    return device


def this_rank() -> int:
    """This process's rank; 0 in a notebook, which has started no processes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 in a notebook."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_objects(item) -> list:
    """One item from every rank, on every rank, in rank order; a notebook has this one alone."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def all_sum(sums: dict[str, float | Tensor], device) -> dict[str, float]:
    """Sums over all ranks; every rank brings the same names."""
    totals = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def all_max(value: float) -> float:
    return max(gather_objects(value))


def say(*parts) -> None:
    """Print on rank 0, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(" ".join(map(str, parts)))
