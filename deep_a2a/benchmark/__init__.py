"""`deep-a2a bench`: times dispatch and combine beside a baseline, checks results, and records what was measured.

Read in this order: `cell` (what is measured), `workload` (data), `job` (the run), `session` (what its cells share),
`measure` (the loop) and `overlap`, `contenders`, `graph` and `alltoall` (what is timed), `clock` and `stream_gate`
(how, on a CPU and on GPUs), `plain` (what results are compared with), `traffic`, `ceiling` and `link` (bytes, and what
the link carries), `record` (the result file), `suites` (lists of cells).
"""
