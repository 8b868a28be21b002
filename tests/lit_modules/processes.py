"""Two processes that train together, as torchrun starts them."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 120


def run_two(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function, which can be pickled, in two processes; raise what one of them raises.

    Raises:
        TimeoutError: They wait for one another, as processes do of which one has missed a collective.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    two = torch.multiprocessing.spawn(_run, args=(port, function, arguments), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    while not two.join(timeout=1):
        if time.monotonic() > end:
            for process in two.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} has not come to its end in two processes after {SECONDS} seconds")


def _run(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in (places | address).items()})
    function(*arguments)
