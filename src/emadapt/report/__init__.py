"""Tables, figures, the page and advice, from the metrics of a study's units.

It reads files only, and runs without torch.
"""
