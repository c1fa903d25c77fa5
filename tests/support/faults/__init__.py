"""Training runs that are killed, whose disk is full and whose files are damaged, at random.

moments: where a run may be struck, and how. damages: what may happen to its files while it is down.
rounds: one run through several of these, to the end, which must be that of an undisturbed one.
"""
