"""Blocks as tasks of dask.distributed: the same bytes, whatever happens to a worker."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dask.distributed import Client, LocalCluster

from emadapt.errors import InputError
from emadapt.segment import cluster, job
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume, work
from tiny import blobs, write_model

IMAGE = np.tile(blobs((6, 90, 100), 2)[0], (2, 2, 1))


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    monkeypatch.setattr(job, "DEPTH", 1)
    write_model(tmp_path / "m")
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    volume, output, model = (str(tmp_path / name) for name in ("in.tif", "out.tif", "m"))
    return Order(volume, output, model, voxel_nm=(30.0, 5.0, 5.0), instances=True)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_workers_give_the_same_bytes_one_of_them_killed(
    order: Order, kill: bool, tmp_path: Path
) -> None:
    segment_volume(order)
    shared = dataclasses.replace(order, output=str(tmp_path / "shared.tif"), dask="local:2")
    marks, killed = tmp_path / "shared.tif.partial/done", []

    def killer() -> None:
        """Ends the worker of the first block as soon as two blocks are done."""
        while len(list(marks.glob("*.json")) if marks.is_dir() else []) < 2:
            time.sleep(0.02)
        worker = next(
            pid
            for pid in children()
            if "nanny" not in command(pid) and "spawn_main" in command(pid)
        )
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)

    thread = threading.Thread(target=killer, daemon=True)
    if kill:
        thread.start()
    segment_volume(shared)
    assert bool(killed) == kill
    for name in (".tif", "-instances.tif", "-instances.csv"):
        assert (tmp_path / f"shared{name}").read_bytes() == (tmp_path / f"out{name}").read_bytes()


def children() -> list[int]:
    """Processes that this one has started, and those that they have."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            parents[int(process.name)] = int(
                (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            )
    found, more = set(), {os.getpid()}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more}
        found |= more
    return sorted(found)


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.slow
def test_workers_of_another_folder_find_what_was_named_from_this_one(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment_volume(order)
    monkeypatch.chdir(Path(order.output).parent)
    here = dataclasses.replace(order, input="in.tif", output="shared.tif", model="m")
    with LocalCluster(
        host="127.0.0.1", n_workers=1, threads_per_worker=1, dashboard_address=None
    ) as workers:
        with Client(workers) as client:
            client.run(os.chdir, "/")
        segment_volume(dataclasses.replace(here, dask=workers.scheduler_address))
    assert Path("shared.tif").read_bytes() == Path("out.tif").read_bytes()


@pytest.mark.slow
def test_an_error_of_the_input_ends_the_run_whole(order: Order) -> None:
    image = IMAGE.astype(np.float32)
    image[7, 3, 3] = np.inf
    tifffile.imwrite(order.input, image, photometric="minisblack")
    with pytest.raises(InputError, match=r"slices 6 to 7.*NaN or infinite"):
        segment_volume(dataclasses.replace(order, dask="local:1", window=(0.0, 255.0)))
    assert not Path(order.output).exists()


@pytest.mark.parametrize(
    ("where", "said"),
    [("local:0", "N of 1"), ("local:x", "N of 1"), ("nonsense://x", "no scheduler")],
)
def test_where_there_are_no_workers(where: str, said: str) -> None:
    with pytest.raises(InputError, match=said), cluster.workers(where, work):
        pass
