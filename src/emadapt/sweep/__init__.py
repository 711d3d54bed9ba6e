"""Optuna: the search space, the objective, running trials, promoting the winner.

It knows nothing of reports.
"""
