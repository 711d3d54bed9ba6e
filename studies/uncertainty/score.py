"""Which measure finds the objects that are not there: `score.py TABLE.csv OBJECTS LABEL`.

TABLE.csv is what `emadapt measure OBJECTS` wrote. An object is false if at most a tenth of it is in
LABEL, where that is not 0.
"""

import sys

import numpy as np
import pandas as pd

from emadapt.metrics.classification import summarise
from emadapt.volumes.opening import open_source


def main(table: str, objects: str, label: str) -> None:
    """Print the area under the ROC curve and the precision among the first ten."""
    numbers, truth = (open_source(name) for name in (objects, label))
    ids, inside = (source.read(0, source.shape[0]).ravel() for source in (numbers, truth))
    found = pd.read_csv(table)
    share = (np.bincount(ids, inside > 0) / np.maximum(np.bincount(ids), 1))[found["id"]]
    false = share <= 0.1
    print(f"{table}: {len(found)} objects, {false.mean():.0%} of them false")
    slices = found["z_max"] - found["z_min"]
    orders = {"uncertainty": found["uncertainty"], "size": -found["voxels"], "slices": -slices}
    for name, order in orders.items():
        ranks = order.rank().to_numpy() / (len(found) + 1)
        score = summarise(false.astype(int), np.stack([1 - ranks, ranks], 1), range(len(found)))
        low, high = score["auroc_ci95"]
        first = false[np.argsort(-ranks, kind="stable")[:10]].mean()
        print(f"{name}: AUROC {score['auroc']:.2f} [{low:.2f}, {high:.2f}], precision {first:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
