"""Fitting a unit and scoring it: the loop, the regimes, learning without labels, several devices.
It knows nothing of reports or sweeps."""
