"""What is to be done: the settings of a study and their rules, its units and their keys. It knows
no files of a dataset, no torch, no tracker."""
