"""Fitting a unit and scoring it.

The loop, the regimes, learning without labels, several devices. It knows nothing of reports or
sweeps.
"""
