"""Runs in MLflow: one for each unit, each sweep and each trial.

An outage of MLflow never stops a training: a run is a file first, and `publish` brings MLflow up to
date with it, now or later. This room knows nothing of the rooms above, which hand it tags, numbers
and paths.
"""
