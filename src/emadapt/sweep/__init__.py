"""Sweeps with Optuna: the search space, the objective, running trials, promoting the winner.

A sweep trains units with `training` and compares them on validation slices alone. Optuna keeps the
trials, chooses their settings, prunes them and notices machines that fall silent. This room knows
nothing of reports.
"""
