"""What is to be done: settings and their rules, units and keys.

It knows no files of a dataset, no torch and no tracker.
"""
