"""From the arguments of a Buffer, on all ranks at once, to a backend that is ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deep_a2a.backend import Backend
from deep_a2a.bootstrap import Member, meet, ranks_per_host
from deep_a2a.group import Group
from deep_a2a.memory import MemoryTable, table_of, with_advice
from deep_a2a.settings import Settings
from deep_a2a.sites import BackendName, Site, StreamName, choose_site, resolve

_BACKENDS = ("auto", "cpu", "cuda", "emulated")
# Of the first meeting, where what the caller gave is no number of seconds.
_USUAL_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Options:
    """The arguments that no shape depends on. See ``Buffer`` for their meaning."""

    backend: BackendName
    device: int | None
    num_sms: int | None
    stream: StreamName
    timeout_s: float
    network_seed: int | None

    def check(self) -> None:
        """Raises ValueError naming the argument, what came and what was expected."""
        if self.backend not in _BACKENDS:
            known = f"{', '.join(map(repr, _BACKENDS[:-1]))} or {_BACKENDS[-1]!r}"
            raise ValueError(f"backend must be {known}, got {self.backend!r}")
        if self.stream not in ("own", "current"):
            raise ValueError(f"stream must be 'own' or 'current', got {self.stream!r}")
        seconds = self.timeout_s
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 1e6:
            raise ValueError(f"timeout_s must be seconds in (0, 1e6], got {seconds!r}")
        for name, least in (("device", 0), ("num_sms", 1), ("network_seed", 0)):
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
            if value is not None and not fits:
                raise ValueError(f"{name} must be None or an int in [{least}, 2**31), got {value!r}")

    def site(self, rank: int) -> Site:
        """Raises ValueError where this rank cannot have the backend."""
        return choose_site(
            resolve(self.backend, self.device),
            rank,
            device=self.device,
            num_sms=self.num_sms,
            stream=self.stream,
            network_seed=self.network_seed,
        )


@dataclass(frozen=True)
class Constructed:
    """What a Buffer stands on."""

    settings: Settings
    memory: MemoryTable
    name: str
    backend: Backend


def construct(group: Group, given: dict[str, Any], ranks_per_node: int | None, options: Options) -> Constructed:
    """With all ranks; raises on all of them where one cannot. `given` are the other arguments of ``Settings``."""
    timeout_s = options.timeout_s
    error: Exception | None = None
    site: Site | None = None
    member: Member | None = None
    try:
        options.check()
        # Whatever is wrong is so with any number of nodes, or comes to light once the ranks have met.
        nodes = group.size if ranks_per_node is None else ranks_per_node
        Settings(num_ranks=group.size, ranks_per_node=nodes, **given).shape()
        site = options.site(group.rank)
        member = site.member
    except (TypeError, ValueError, RuntimeError) as bad:
        timeout_s, error = _USUAL_TIMEOUT_S, bad
    name = None if site is None else site.name
    compared = {**given, "ranks_per_node": ranks_per_node, "backend": name, "num_sms": options.num_sms}
    try:
        members = meet(group, compared, member, error, timeout_s)
        assert site is not None  # else there was an error, which was raised
        if ranks_per_node is None:
            ranks_per_node = ranks_per_host([other["host"] for other in members])
        settings = Settings(num_ranks=group.size, ranks_per_node=ranks_per_node, **given)
        memory = table_of(settings.shape())
        try:
            backend = site.connect(group, members, settings, memory.total_bytes, timeout_s)
        except MemoryError as short:
            raise with_advice(short, memory) from short
        return Constructed(settings, memory, site.name, backend)
    finally:
        if site is not None:
            site.close()
