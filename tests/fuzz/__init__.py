"""Seeded, structure-aware mutations of everything the program reads from strangers.

    python -m tests.fuzz --count 100000 --seed 1        all readers, in the proportion of what they cost
    python -m tests.fuzz --only loras --count 5000      one reader
    python -m tests.fuzz --only loras --at 1234 --seed 1    one input again, with its traceback

Every input is refused by an error of ours or accepted. Anything else that is raised, more than 5 s of computing, more
than 500 MB, a file written outside the folder given and a program started are failures.
"""
