"""Train a small MoE language model on the sources of Python's standard library, its experts spread over 8 ranks.

    python examples/train_moe.py                                      # starts the ranks itself
    torchrun --nproc-per-node 8 examples/train_moe.py                 # each process is a rank
    python examples/train_moe.py --single-process                     # the same model without communication

`--help` lists the options. The code is in `deep_a2a/demo`, for ``deep-a2a demo`` runs the same: `train` is where the
Buffer and the MoE layers are made, `model` the transformer around them.
"""

from __future__ import annotations

import sys

from deep_a2a.demo import main

if __name__ == "__main__":
    sys.exit(main(prog="train_moe.py"))
