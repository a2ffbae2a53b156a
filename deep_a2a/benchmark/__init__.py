"""`deep-a2a bench`: times dispatch and combine beside a baseline, checks results, and records what was measured.

Read in this order: `cell` (what is measured), `workload` (data), `launch` and `launcher` (ranks, of one host or
several), `job` (the run), `session` (what its cells share), `measure` (the loop) and `overlap`, `contenders`, `graph`
and `alltoall` (what is timed), `clock` and `stream_gate` (how, on a CPU and on GPUs), `plain` (what results are
compared with), `traffic` (bytes), `ceiling`, `link` and `network` (what links carry: of the cpu backend, within a node,
between nodes) and `fabric` (the last two, with a gate), `record` and `figures` (the result file), `suites` (lists of
cells).
"""
