"""Runs in MLflow: one run for each unit, written so that an outage never stops a training. It
knows nothing of the rooms above, which hand it what to log."""
