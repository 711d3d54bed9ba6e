"""Slices as they enter a model, kept in memory: to align and resize them takes long."""

from __future__ import annotations

from emadapt.data.ingest import Volume
from emadapt.data.tiles import Geometry, Grey, to_input, with_neighbours

KEPT_BYTES = 256 * 2**20  # memory that a dataset's prepared slices may take in a process


class PreparedSlices:
    """Slices as `tiles.to_input` gives them, kept as they come: draws are uniform."""

    def __init__(self, volume: Volume, geo: Geometry, context: int = 0) -> None:
        self.volume, self.geo, self.context = volume, geo, context
        self._kept: dict[int, Grey] = {}
        self.free = KEPT_BYTES

    def __getitem__(self, z: int) -> Grey:
        """(H, W), or with `context` (H, W, 3), uint8, read only."""
        if z in self._kept:
            return self._kept[z]
        image = to_input(with_neighbours(self.volume, z, self.context), self.geo)
        image.setflags(write=False)
        if image.nbytes <= self.free:
            self._kept[z], self.free = image, self.free - image.nbytes
        return image
