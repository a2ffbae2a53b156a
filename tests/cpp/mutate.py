"""Shows that the C++ driver would notice: takes one ordering out of the protocol at a time and expects it to fail.

Run by ``make mutants``. Each mutant is built in a copy of the sources under ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROUNDS = "15"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    """One edit: `old` stands in `file` exactly once."""

    name: str
    file: str
    old: str
    new: str


WAIT = "transport_.wait_tagged(turn, "
RELAY_ROWS = """\
                for (int64_t row = first_row; row < end_row; ++row) {
                  relay_row(source, from + row * stream_row_.bytes, routes + row * topk);
                }
"""
GIVE_CREDIT = """\
                if (is_filled_again(shape_, round)) give_chunk_credit(transport_, turn, stream, round, chunk);
"""

# Not among them: the lane credit of ranks of one node. Today the flags of every operation happen to order the same, so
# nothing can notice; it is there so that no operation has to be ordered by another one's flags. Nor the credits of
# chunks without a successor in the round after the next: a network would have to keep a signal for a whole operation.
MUTANTS = (
    Mutant("D0, C0: no credit of rail peers", "credit.cpp", "wait(transport.rail_peer(stream));", "(void)wait;"),
    Mutant("D0: no credit of the slot", "dispatch.cpp", "d0_slot_credit(turn);\n  d4_send_own", "d4_send_own"),
    Mutant("one word for all lane credits", "credit.cpp", "(epoch & 1)", "(epoch & 0)"),
    Mutant(
        "D4: flag before the rows",
        "dispatch.cpp",
        "::d4_send_own_node(const Turn& turn) {",
        "::d4_send_own_node(const Turn& turn) {"
        "transport_.signal_node(turn, Region::kSentFlag, transport_.local_rank(), Tag::word(turn.epoch, tag_));",
    ),
    Mutant(
        "C2, C3: rows not waited for", "combine.cpp", WAIT + "transport_.word", "if (false) " + WAIT + "transport_.word"
    ),
    Mutant("C4: chunks not waited for", "combine.cpp", WAIT + "chunk_word", "if (false) " + WAIT + "chunk_word"),
    Mutant(
        "C5: readers not waited for",
        "combine.cpp",
        "wait_rows_read(transport_, turn, Step::kC5CreditReturned);",
        "",
    ),
    Mutant(
        "D4: credit of chunks not waited for",
        "dispatch_nodes.cpp",
        "wait_chunk_credit(transport_, turn, Step::kD4SendNodes, stream, before, credits);",
        "(void)credits;",
    ),
    Mutant(
        "D4: credit of the first chunk alone",
        "dispatch_nodes.cpp",
        "stream, before, credits)",
        "stream, before, 1)",
    ),
    Mutant(
        "D5: credit before the chunk is read",
        "dispatch_nodes.cpp",
        RELAY_ROWS + GIVE_CREDIT,
        GIVE_CREDIT + RELAY_ROWS,
    ),
    Mutant(
        "C3: credit of rounds not waited for",
        "combine.cpp",
        "wait_chunk_credit(transport_, turn, Step::kC3Relay, stream, round - kStagedRounds, 1);",
        "",
    ),
    Mutant(
        "C4: credit before the tokens are summed",
        "combine.cpp",
        "c2_c4_sum(turn, round);\n    c4_give_credit(turn, round);",
        "c4_give_credit(turn, round);\n    c2_c4_sum(turn, round);",
    ),
    Mutant("tagged flags not waited for", "transport.cpp", "if (!reached(condition)) wait_any(turn, {condition});", ""),
    Mutant("signals do not release", "doorbell.hpp", "__ATOMIC_RELEASE", "__ATOMIC_RELAXED"),
    Mutant("a signal before its last piece", "network.cpp", "pending.pieces.empty()", "pending.pieces.size() <= 1"),
)


def run_driver(tree: Path) -> bool:
    """Build the driver of `tree` and run it; whether it passed. RuntimeError if it does not build."""
    build = tree / "build"
    configure = ["cmake", "-S", str(tree), "-B", str(build), "-G", "Ninja", "-DDEEP_A2A_PYTHON=OFF"]
    options = ["-DDEEP_A2A_TESTS=ON", "-DDEEP_A2A_CUDA=OFF", "-DDEEP_A2A_SANITIZE=thread"]
    for command in ([*configure, *options], ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
    unshuffled = ["setarch", "-R"] if shutil.which("setarch") else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    try:
        driver = [*unshuffled, str(build / "protocol_driver"), ROUNDS]
        return subprocess.run(driver, env=environment, capture_output=True, timeout=TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        for name in ("csrc", "cmake", "tests/cpp"):
            shutil.copytree(ROOT / name, tree / name)
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        if not run_driver(tree):
            print("the driver fails on the sources as they are")
            return 1
        for mutant in MUTANTS:
            file = tree / "csrc" / "cpu" / mutant.file
            source = file.read_text()
            if source.count(mutant.old) != 1:
                raise RuntimeError(
                    f"{mutant.name}: {mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
                )
            file.write_text(source.replace(mutant.old, mutant.new))
            passed = run_driver(tree)
            file.write_text(source)
            print(f"{'NOT NOTICED' if passed else 'noticed':12} {mutant.name}", flush=True)
            survivors += [mutant.name] if passed else []
    print(f"{len(MUTANTS) - len(survivors)} passed, {len(survivors)} failed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
