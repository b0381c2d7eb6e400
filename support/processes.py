"""The processes of a run: start and end them, let them exchange objects and sums, print on one.

A run ends in one of three ways. All ranks are done and leave together. A signal asked for it: all
leave after the same step. A rank fails: it says why, before anything else that could wait, and then
all others end within seconds, wherever they wait, because a collective on a GPU would not return
for half an hour.
"""

import atexit
import contextlib
import datetime
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


POLL = 0.5  # seconds between looks at whether another rank has failed
FAILED = "failed"  # key of the store, set by a rank that fails


# --------------------------------------------------------------------------------------------------
# Start


def start_processes(timeout: float = 30.0) -> torch.device:
    """Join the other ranks of torchrun; without torchrun, be the only one. Returns this rank's
    device.

    A rank that waits for another longer than `timeout`, in minutes, gives up, and the run ends.
    """
    limit = datetime.timedelta(minutes=timeout)
    store, rank, world = dist.HashStore(), 0, 1
    if "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store when it restarts the ranks, and with it the addresses of the
            # dead ones
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    if world > 1:
        watch = Watch(run_store())
        watch.start()
        atexit.register(watch.stop)
    return device


def run_store() -> dist.Store:
    """What all ranks can write to and read without waiting for each other."""
    return dist.distributed_c10d._get_default_store().clone()


def this_rank() -> int:
    """This process's rank; 0 in a notebook."""
    return dist.get_rank() if dist.is_initialized() else 0


# --------------------------------------------------------------------------------------------------
# End


def explain_failure(error: BaseException) -> None:
    """Say why the run ends: the first rank that fails does, the others only follow.

    What a user can cause, an error that this project raises, is its sentence. Anything else is a
    bug, and keeps its traceback.
    """
    first = os.environ.get("RANK", "0") == "0"  # of those that read the same command line
    if dist.is_initialized():
        try:
            first = run_store().add("failures", 1) == 1
        except RuntimeError:  # it went with the process that held it
            first = True
    if first:
        lines = [f"error: {error}\n"] if is_explained(error) else traceback.format_exception(error)
        sys.stdout.flush()
        print("".join(lines), end="", file=sys.stderr, flush=True)


def run_command(main: Callable[[], None]) -> None:
    """Run a command without ranks. A failure is told as in a training, and exits with 1."""
    try:
        main()
    except Exception as error:
        explain_failure(error)
        sys.exit(1)


def is_explained(error: BaseException) -> bool:
    """Whether a `raise` of this project made the error, and so wrote what is wrong and what to
    do about it."""
    frames = traceback.extract_tb(error.__traceback__)
    if type(error) not in (ValueError, RuntimeError) or not frames:
        return False
    origin = frames[-1]
    ours = Path(origin.filename).resolve().is_relative_to(ROOT)
    return ours and origin.line.startswith("raise ")


def end_failed() -> NoReturn:
    """End this process with exit code 1, and all others with it.

    Nothing of several ranks is torn down: what their GPUs have begun together waits for ranks that
    will not come.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        sys.exit(1)
    with contextlib.suppress(RuntimeError):  # the store may be gone
        run_store().set(FAILED, "")
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2 * POLL)  # this process may hold the store in which the others look
    os._exit(1)


class Watch(threading.Thread):
    """Ends this process once another rank has failed, wherever the main thread waits."""

    def __init__(self, store: dist.Store):
        super().__init__(daemon=True)
        self.store = store
        self.over = threading.Event()

    def run(self) -> None:
        # the store goes when the run is over, or with the machine that held it
        with contextlib.suppress(RuntimeError):
            while not self.over.wait(POLL):
                if self.store.check([FAILED]):
                    os._exit(1)

    def stop(self) -> None:
        """Come to an end before Python does, which would stop this thread amid the store's C++ code
        and so abort the process."""
        self.over.set()
        self.join(10 * POLL)


# --------------------------------------------------------------------------------------------------
# Exchange


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
    values = [float(value) for value in sums.values()]
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def all_max(value: float) -> float:
    """The largest of all ranks' values."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# --------------------------------------------------------------------------------------------------
# Print


def say(*parts) -> None:
    """Print on rank 0, above the progress bar."""
    if this_rank() == 0:
        tqdm.write(" ".join(map(str, parts)))


def quieten_libraries() -> None:
    """Leave the console to what this project says: no bars of transformers, and none of its and
    torch's warnings that a user can do nothing about."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # an export needs none
    # of in-place changes to a model's output, of which there are none
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    generation = logging.getLogger("transformers.generation.configuration_utils")
    generation.setLevel(logging.ERROR)  # of a flag that greedy decoding does not need
