"""Sweeps: many fits from stores, one row each in results.jsonl, resumable; picks come from a selection split alone."""

from heads.sweeps.plan import PAPERS, PRIORS, HeadGrid, Splits, SweepPlan, read_plan
from heads.sweeps.run import run_sweep
from heads.sweeps.summary import picks, summarise, sweep_table

__all__ = [
    "PAPERS",
    "PRIORS",
    "HeadGrid",
    "Splits",
    "SweepPlan",
    "picks",
    "read_plan",
    "run_sweep",
    "summarise",
    "sweep_table",
]
