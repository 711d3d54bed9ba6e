"""Runs in MLflow: one run for each unit.

An outage of MLflow never stops a training. This room knows nothing of the rooms above, which hand
it what to log.
"""
