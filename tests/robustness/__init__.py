"""Fault tests: real nodes answer while processes and links fail; no token may change, and nothing may be left behind.

A trial is some traffic and a fault, both drawn from a seed and the trial's number.

    traffic.py    what clients ask
    faults.py     what goes wrong, where and when
    cluster.py    the nodes' processes and the links between them
    validate.py   what must hold afterwards
    trial.py      one trial
    report.py     the table of many trials

`make robustness FAULTS=1000 SEED=1` runs a thousand trials; docs/robustness.md has its results.
"""
