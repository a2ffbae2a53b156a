"""The network between pretended nodes of this host, where there is one for tests.

DEEP_A2A_LOOPBACK_NETWORK names a directory that says in its file `env` how NVSHMEM gets a network on this host, such
that nodes reach each other by it alone. A rank's node has to be known when its process joins the job, hence all
topologies of one run have the same number of ranks per node.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator

DIRECTORY = os.environ.get("DEEP_A2A_LOOPBACK_NETWORK")
RANKS_PER_NODE = int((os.environ.get("DEEP_A2A_TEST_GPU_NODES") or "1x1").split(",")[0].partition("x")[2])


@functools.cache
def environment() -> dict[str, str]:
    """What a shell has after it has read `env`, beside what it had before."""
    if DIRECTORY is None:
        return {}
    command = ["bash", "-c", '. "$0/env" && exec env -0', DIRECTORY]
    shown = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout.decode()
    pairs = (item.partition("=") for item in shown.split("\0") if item)
    return {name: value for name, _, value in pairs if os.environ.get(name) != value}


def of_rank(rank: int, ranks_per_node: int = RANKS_PER_NODE) -> dict[str, str]:
    """What tells a rank's process which node it is on."""
    return {} if DIRECTORY is None else {"NVSHMEM_FAKE_HOST": f"node{rank // ranks_per_node}"}


@contextlib.contextmanager
def for_children() -> Iterator[None]:
    """Processes started meanwhile have the network; this one is too late for what is preloaded."""
    before = {name: os.environ.get(name) for name in environment()}
    os.environ.update(environment())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
