"""Learning `t_ratios`, and the grid, with the network frozen: step by step, and end to end.

Every random draw is keyed by (seed, step, iteration), so a run that is stopped at any iteration and resumed
from its `TuningState` gives the same numbers as an unbroken one, and a step gives the same ratio whether it
is tuned alone or in one batch with others.
"""
