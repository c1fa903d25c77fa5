"""Generated cases of every operator against the fp64 truth: `make fuzz`, and a part in `make test`.

options   what may vary, a table: an option is an entry
layouts   how the same numbers may lie in memory, a table
problem   a case as tensors, what a call and what the truth answer
bounds    how far an answer may lie from the truth, entry by entry
"""
