"""What README.md shows works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
SCRIPTS = {match[1]: block for block in BLOCKS if (match := re.search(r"torchrun --nproc-per-node 4 (\w+)\.py", block))}
FRAGMENTS = [block for block in BLOCKS if block not in SCRIPTS.values()]

# What the fragment takes for granted; local expert e of rank r multiplies by 2 r + e.
AROUND_FRAGMENT = """
import torch
import torch.distributed as dist

import deep_a2a

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
sizes = {{"hidden": 256, "num_experts": 8, "num_topk": 2, "num_max_tokens_per_rank": 64}}
tokens = torch.randn(50, 256, dtype=torch.bfloat16)
topk_idx = torch.randint(0, 8, (50, 2))  # some name an expert twice
topk_weights = torch.rand(50, 2)
experts = [lambda rows, e=e: rows * (2 * rank + e) for e in range(2)]
with deep_a2a.Buffer(dist.group.WORLD, layout="rank", ranks_per_node=2, **sizes) as buffer:
{fragment}
expected = tokens.float() * (topk_weights * topk_idx).sum(1, keepdim=True)
error = (combined.x.float() - expected).abs().max() / expected.abs().max()
assert error < 0.05, error
print(f"rank {{rank}}: close")
"""


def run_on_four_ranks(script: Path) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(("name", "prints"), [("small_moe", "received"), ("train_layer", "loss")])
def test_script_runs(tmp_path: Path, name: str, prints: str) -> None:
    script = tmp_path / f"{name}.py"
    script.write_text(SCRIPTS[name])
    printed = run_on_four_ranks(script)
    assert sorted(re.findall(rf"rank (\d): {prints}", printed)) == ["0", "1", "2", "3"], printed


def test_fragment_computes_what_it_should(tmp_path: Path) -> None:
    assert len(FRAGMENTS) == 1
    script = tmp_path / "fragment.py"
    script.write_text(AROUND_FRAGMENT.format(fragment=textwrap.indent(FRAGMENTS[0], "    ")))
    assert run_on_four_ranks(script).count("close") == 4


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert "docs/protocol.md" in links and all((README.parent / link).is_file() for link in links), links


def test_names_both_commands() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README.read_text()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
