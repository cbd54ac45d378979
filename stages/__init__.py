"""RL: one package per stage, all of the same shape; no stage imports another. `tables.py` is the data flow on one page."""

from stages.lighter_imports import leave_out_scikit_learn

leave_out_scikit_learn()
