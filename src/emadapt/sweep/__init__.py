"""Sweeps: Optuna searches the settings of a regime for the best validation IoU."""
