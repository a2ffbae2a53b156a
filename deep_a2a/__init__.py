"""Expert-parallel communication for Mixture-of-Experts models: dispatch tokens to their experts, combine the outputs.

`Buffer` is where to start. `routing` holds the gate, `quant` the FP8 casts, `moe` a layer built of all of them, and
`errors` what operations can end with.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Imported when they are first used: they need torch, which callers with other arrays need not have.
_WITH_TORCH = ("moe", "quant", "routing")

if TYPE_CHECKING:
    from deep_a2a import moe, quant, routing

try:
    from deep_a2a import _cpu as _cpu
except ImportError as error:
    _missing = error

    def __getattr__(name: str) -> object:
        # Not at import, so that `deep-a2a info` can tell what else is missing.
        raise ImportError(
            f"deep_a2a was imported from {__path__[0]}, which holds no native module that fits this Python. Run 'pip "
            "install .', then start Python outside of the source folder; or 'pip install --editable .'"
        ) from _missing
else:
    from deep_a2a import errors
    from deep_a2a.buffer import Buffer
    from deep_a2a.errors import CapacityError, CommError, CommTimeoutError, LeaseError, MismatchError, PeerAbortError
    from deep_a2a.memory import MemoryTable
    from deep_a2a.pending import PendingCombine, PendingDispatch
    from deep_a2a.results import CombineResult, DispatchHandle, DispatchResult
    from deep_a2a.settings import memory_table

    def __getattr__(name: str) -> object:
        if name in _WITH_TORCH:
            return import_module(f"deep_a2a.{name}")
        raise AttributeError(f"module 'deep_a2a' has no attribute {name!r}")


__all__ = [
    "Buffer",
    "CapacityError",
    "CombineResult",
    "CommError",
    "CommTimeoutError",
    "DispatchHandle",
    "DispatchResult",
    "LeaseError",
    "MemoryTable",
    "MismatchError",
    "PeerAbortError",
    "PendingCombine",
    "PendingDispatch",
    "errors",
    "memory_table",
    "moe",
    "quant",
    "routing",
]
