"""`deep-a2a bench`: times dispatch and combine beside a baseline, checks results, and records what was measured.

Read in this order: `cell` (what is measured), `workload` (data), `measure` (the loop), `contenders` (what is timed),
`clock` (how), `plain` (what results are compared with), `traffic` and `ceiling` (bytes, and what the link carries),
`record` (the result file).
"""
