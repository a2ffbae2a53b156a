"""Which NVSHMEM is taken, which is refused and with what advice, and what it is told. Nothing here needs NVSHMEM."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from deep_a2a import nvshmem_environment as environment
from deep_a2a import nvshmem_library as library
from deep_a2a.errors import CommError
from deep_a2a.nvshmem_job import agree, within
from deep_a2a.nvshmem_library import Library, LibraryError, check_version
from deep_a2a.nvshmem_memory import common_range

Install = Callable[[int, bytes], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(cuda_major, content)` puts a wheel with that host library onto an otherwise empty path."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(library, "mapped_library", lambda: None)

    def put(cuda_major: int, content: bytes) -> Path:
        name = f"nvidia_nvshmem_cu{cuda_major}-3.4.5.dist-info"
        path = tmp_path / "nvidia" / "nvshmem" / "lib" / library.SONAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").write_text(f"Name: nvidia-nvshmem-cu{cuda_major}\nVersion: 3.4.5\n")
        (tmp_path / name / "RECORD").write_text(f"nvidia/nvshmem/lib/{library.SONAME},sha256=x,{len(content)}\n")
        return path

    return put


def test_the_wheel_for_the_cuda_of_the_build(install: Install) -> None:
    path = install(13, b"one")
    assert library.find_library(13) == path


def test_no_wheel(install: Install) -> None:
    with pytest.raises(LibraryError, match=r"not installed: pip install 'nvidia-nvshmem-cu13>=3\.4\.5,<4'"):
        library.find_library(13)


def test_the_wheel_for_another_cuda(install: Install) -> None:
    install(12, b"one")
    with pytest.raises(LibraryError, match=r"built with CUDA 13.*\(nvidia-nvshmem-cu12\): pip uninstall"):
        library.find_library(13)


def test_wheels_that_overwrite_each_other(install: Install) -> None:
    install(13, b"one")
    install(12, b"the other")
    with pytest.raises(LibraryError, match="not the one of nvidia-nvshmem-cu13: wheels for another CUDA"):
        library.find_library(13)
    assert library.find_library(12).read_bytes() == b"the other"


def test_a_wheel_without_its_files(install: Install) -> None:
    install(13, b"one").unlink()
    with pytest.raises(LibraryError, match=r"is gone: .* --force-reinstall"):
        library.find_library(13)


def test_what_is_no_library(install: Install) -> None:
    with pytest.raises(LibraryError, match="does not load as NVSHMEM 3"):
        library.open_library(install(13, b"one"), False)


def test_the_library_that_somebody_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "mapped_files", lambda: [Path("/lib/libc.so.6"), Path("/a/b") / library.SONAME])
    assert library.find_library(13) == Path("/a/b") / library.SONAME


@pytest.mark.parametrize(
    ("version", "direct", "problem"),
    [
        ((3, 4, 5), True, None),
        ((3, 4, 6), True, None),
        ((3, 6, 0), False, None),
        ((3, 6, 0), True, "kernels are to drive the NIC"),
        ((3, 4, 4), False, "was compiled with that"),
        ((3, 3, 20), False, "was compiled with that"),
        ((4, 0, 0), False, r"a later 3\.x"),
        ((2, 12, 0), False, r"a later 3\.x"),
    ],
)
def test_versions(version: tuple[int, int, int], direct: bool, problem: str | None) -> None:
    found = Library(Path("/a/b"), version, loaded_before=True)
    if problem is None:
        check_version((3, 4, 5), found, direct)
        return
    with pytest.raises(LibraryError, match=problem) as error:
        check_version((3, 4, 5), found, direct)
    assert "/a/b, which was loaded before" in str(error.value) and "==3.4.*'" in error.value.remedy


@pytest.mark.parametrize(("value", "direct"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_transports_that_kernels_drive(value: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", value)
    monkeypatch.delenv("NVSHMEM_REMOTE_TRANSPORT", raising=False)
    assert library.is_direct() is direct
    assert environment.remote_transport() == ("ibgda" if direct else "ibrc")


@pytest.mark.skipif(find_spec("deep_a2a._nvshmem") is None, reason="this build has no _nvshmem")
def test_the_module_loads_or_says_what_it_needs() -> None:
    try:
        native, found = library.load()
    except LibraryError as error:
        assert error.remedy
        return
    assert native.library_version() == found.version >= native.compiled_version()
    assert native.job_status() == native.JobStatus.none


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.defaults(0, 1):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "0")
    environment.prepare(heap_bytes=2**33, num_queues=12)
    assert os.environ["NVSHMEM_DISABLE_NVLS"] == "0"
    assert os.environ["NVSHMEM_IBGDA_NUM_RC_PER_PE"] == "12"
    assert int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) > 2**33


def test_nics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_INFINIBAND", tmp_path)
    monkeypatch.delenv("NVSHMEM_REMOTE_TRANSPORT", raising=False)
    monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA", raising=False)
    assert "NVSHMEM_REMOTE_TRANSPORT" in (environment.missing_network() or "")
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert environment.nics() == ["mlx5_0 port 1 ACTIVE 400 Gb/sec (4X NDR) ?"]
    assert environment.missing_network() is None


@pytest.mark.parametrize(("ibgda", "queues", "is_wrong"), [("1", "0", True), ("1", "4", False), ("0", "0", False)])
def test_shared_queues(ibgda: str, queues: str, is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVSHMEM_REMOTE_TRANSPORT", raising=False)
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", ibgda)
    monkeypatch.setenv("NVSHMEM_IBGDA_NUM_RC_PER_PE", queues)
    assert ("NVSHMEM_IBGDA_NUM_RC_PER_PE is 0" in (environment.shared_queues() or "")) == is_wrong


VERSIONS = [(3, 4, 5), (3, 6, 0)]


def state(
    status: str, pe: int | None = None, num_pes: int | None = None, versions: object = VERSIONS
) -> dict[str, object]:
    return {"status": status, "pe": pe, "num_pes": num_pes, "versions": versions}


def test_ranks_without_a_job_make_one() -> None:
    assert agree([state("none"), state("none")]) is None


def test_ranks_of_a_job_share_it() -> None:
    assert agree([state("ready", 5, 8), state("ready", 2, 8)]) == [5, 2]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([state("none"), state("ready", 0, 1)], r"\(ranks \[0\]: none, ranks \[1\]: ready\)"),
        ([state("bootstrapped"), state("bootstrapped")], "some ranks"),
        ([state("ready", 0, 2), state("ready", 1, 3)], r"different NVSHMEM jobs: PEs \[0, 1\] of \[2, 3\]"),
        ([state("ready", 0, 2), state("ready", 0, 2)], "different NVSHMEM jobs"),
        ([state("none"), state("none", versions=[(3, 4, 5), (3, 4, 5)])], r"rank 1 has 3\.4\.5, compiled with 3\.4\.5"),
    ],
)
def test_ranks_that_cannot_share(states: list[dict[str, object]], message: str) -> None:
    with pytest.raises(CommError, match=message):
        agree(states)


@pytest.mark.parametrize(
    ("offers", "nbytes", "found"),
    [
        ([[(0, 0, 100)], [(0, 0, 100)]], 100, (0, 0)),
        ([[(0, 0, 100)], [(1, 0, 100)]], 1, None),
        ([[(0, 0, 100)], [(0, 40, 100)]], 60, (0, 40)),
        ([[(0, 0, 100)], [(0, 40, 100)]], 61, None),
        ([[(0, 0, 100), (1, 0, 50)], [(0, 0, 100), (1, 10, 40)]], 20, (1, 10)),
        ([[(0, 0, 100), (0, 200, 100)], [(0, 50, 200)], [(0, 60, 30), (0, 210, 30)]], 30, (0, 60)),
        ([[(0, 0, 64)]], 61, None),
        ([[]], 1, None),
    ],
)
def test_ranges_that_all_have(
    offers: list[list[tuple[int, int, int]]], nbytes: int, found: tuple[int, int] | None
) -> None:
    assert common_range(offers, nbytes, 10) == found


def test_a_call_without_a_deadline_gets_one() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        within(0.05, never.wait)
    never.set()
