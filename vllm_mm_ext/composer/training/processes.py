"""Data-parallel training over processes of this machine: who is who, and how they are started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# The first process evaluates and saves while the others wait.
_PATIENCE = timedelta(hours=2)
_LOOPBACK = "127.0.0.1"


def launched() -> bool:
    """Whether this process is one of several that `launch` started."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process, from 0; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(processes: int) -> int:
    """Run this command in so many processes, one CPU thread each, until all have ended.

    Returns:
        The first exit status that is not 0, or 0. The others are ended when one fails.
    """
    with socket.socket() as free:
        free.bind((_LOOPBACK, 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port)}
    command = [sys.executable, *sys.orig_argv[1:]]
    children = [
        subprocess.Popen(
            command, env=os.environ | common | {"RANK": str(number), "OMP_NUM_THREADS": "1"}
        )
        for number in range(processes)
    ]
    try:
        for child in children:
            status = child.wait()
            if status:
                return status
        return 0
    finally:
        for child in children:
            child.terminate()
            child.wait()


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes of `launch` inside the block; alone: nothing to do."""
    if not launched():
        yield
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Average gradients over all processes; one that has none where another has one counts as 0.

    A process has none for what its batch does not use, such as the audio tower without sound.
    What no process uses keeps no gradient, so that optimizers leave it alone.

    Args:
        parameters: The same ones in all processes, in the same order.
    """
    used = torch.tensor([parameter.grad is not None for parameter in parameters]).int()
    dist.all_reduce(used, dist.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))
