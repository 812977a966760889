"""Speed and memory, side by side with a baseline in one run.

    python -m benchmarks                            # all of them, as a table
    python -m benchmarks 'prune.*' --json FILE      # some of them, their records merged by name into FILE
    python -m benchmarks --list

A figure is a ratio (or a rate beside the baseline's rate), measured in rounds that alternate candidate and baseline,
with a distribution-free interval around the median. Numbers from one run are comparable with each other; numbers from
two runs or two machines are not. Nothing in the tests fails on time.

Every public module of this package registers its benchmarks when imported: `_harness.py` says how to add one.
"""
