"""Processes that stay: functions run on the first few of them, each with the mesh of these."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

SIZE = 4


def _work(rank: int, port: int, pipe: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=SIZE)
    from torch.distributed.device_mesh import DeviceMesh

    meshes = {
        str(shape): DeviceMesh(
            "cpu",
            torch.arange(torch.Size(shape).numel()).view(shape),
            mesh_dim_names=("replicas", "shards")[-len(shape) :],
        )
        for shape in ((1,), (2,), (3,), (4,), (2, 2))
    }
    while (order := pipe.recv()) is not None:
        function, shape, arguments = order
        try:
            torch.manual_seed(0)
            pipe.send((function(meshes[str(shape)], *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Ranks:
    """Four gloo processes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], shape: tuple[int, ...], *arguments: Any) -> Any:
        """Return what ``function(mesh, *arguments)`` returned on every rank of the mesh."""
        pipes = self._pipes[: torch.Size(shape).numel()]
        for pipe in pipes:
            pipe.send((function, shape, arguments))
        answers = [pipe.recv() if pipe.poll(120) else (None, "no answer") for pipe in pipes]
        errors = [error for _, error in answers if error]
        assert not errors, errors[0]
        return [result for result, _ in answers]

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.terminate()
