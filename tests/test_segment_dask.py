"""Blocks as tasks of dask.distributed: the same bytes, whatever happens to a worker."""

import dataclasses
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from dask.distributed import Client, LocalCluster

from emadapt.errors import InputError
from emadapt.segment import cluster, job
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume, work
from processes import until
from tiny import blobs, write_model

IMAGE = np.tile(blobs((6, 90, 100), 2)[0], (2, 2, 1))


@pytest.fixture
def order(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "DEPTH", 1)
    write_model(tmp_path / "m")
    tifffile.imwrite(tmp_path / "in.tif", IMAGE, photometric="minisblack")
    volume, output, model = (str(tmp_path / name) for name in ("in.tif", "out.tif", "m"))
    return Order(volume, output, model, voxel_nm=(30.0, 5.0, 5.0), instances=True)


@pytest.mark.slow
def test_workers_give_the_same_bytes_though_one_of_them_is_killed(order, tmp_path):
    segment_volume(order)
    done, killed = tmp_path / "shared.tif.partial/done", []

    def killer():
        """Ends the first worker as soon as two blocks are done."""
        until(lambda: done.is_dir() and len(list(done.glob("*.json"))) >= 2, 600)
        below = psutil.Process().children(recursive=True)
        (worker, *_) = [p for p in below if "--multiprocessing-fork" in p.cmdline()]
        worker.kill()
        killed.append(worker.pid)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    shared = dataclasses.replace(order, output=str(tmp_path / "shared.tif"), dask="local:2")
    segment_volume(shared)
    assert killed
    for name in (".tif", "-instances.tif", "-instances.csv"):
        assert (tmp_path / f"shared{name}").read_bytes() == (tmp_path / f"out{name}").read_bytes()


@pytest.mark.slow
def test_workers_of_another_folder_find_what_was_named_from_this_one(order, monkeypatch):
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
def test_an_error_of_the_input_ends_the_run_whole(order):
    image = IMAGE.astype(np.float32)
    image[7, 3, 3] = np.inf
    tifffile.imwrite(order.input, image, photometric="minisblack")
    with pytest.raises(InputError, match=r"slices 6 to 7.*NaN or infinite"):
        segment_volume(dataclasses.replace(order, dask="local:1", window=(0.0, 255.0)))
    assert not Path(order.output).exists()


@pytest.mark.parametrize(
    ("where", "said"), [("local:x", "N of 1"), ("nonsense://x", "no scheduler")]
)
def test_where_there_are_no_workers(where, said):
    with pytest.raises(InputError, match=said), cluster.workers(where, work):
        pass
