"""`deep-a2a plan`: what dispatch and combine cost on machines that one does not have.

Read in this order: `workload` (what is sent), `spread` and `sampled` (how many ranks and nodes a token goes to), `wire`
and `traffic` (bytes), `rates` and `roofline` (times), `windows` (memory), `plan` (all of these), `published`, `reasons`
and `measured` (the model beside figures of others and of this project), `tables`, `report` and `command` (what is
printed). Plain planning needs no torch; sampled routings do.
"""

from __future__ import annotations

from .plan import Plan, make_plan
from .rates import Hardware
from .workload import Workload

__all__ = ["Hardware", "Plan", "Workload", "make_plan"]
