"""The command `deep-a2a`. Each subcommand has its own parser, and its modules are imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_DESCRIPTION = """\
Expert-parallel dispatch and combine for Mixture-of-Experts layers.

commands:
  info   what is available here and, for what is not, how to get it
  demo   train a small MoE language model, its experts spread over 8 ranks in 2 pretended nodes
  bench  measure dispatch and combine beside torch.distributed.all_to_all_single
  plan   predict bytes, times and memory for any number of ranks and nodes

`deep-a2a COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (default: the process's arguments) and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="deep-a2a", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", choices=("info", "demo", "bench", "plan"), metavar="COMMAND", help="info, demo, bench or plan"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the command")
    options = parser.parse_args(argv)
    if options.command == "info":
        from deep_a2a.info import main as command
    elif options.command == "demo":
        from deep_a2a.demo import main as command
    elif options.command == "plan":
        from deep_a2a.planner.command import main as command
    else:
        from deep_a2a.benchmark.command import main as command
    return command(options.arguments, prog=f"deep-a2a {options.command}")


if __name__ == "__main__":
    sys.exit(main())
