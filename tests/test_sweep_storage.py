"""Where a sweep is kept, and what is refused before anything runs."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from click.testing import CliRunner

from emadapt.cli import main
from emadapt.errors import InputError
from emadapt.sweep.storage import Store, difference, find_sweep, open_store, open_sweep, sweep_names
from tiny import make_study, settings

RUN = ["sweep", "run", "--backbone", "t", "--train-set", "a"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def refused(*words: str) -> str:
    started = time.monotonic()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert time.monotonic() - started < 20
    errors = [line for line in result.output.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(errors) == 1, result.output
    return errors[0]


def begin(
    store: Store, name: str = "s", *, definition: dict[str, Any] | None = None, data: str = "x"
) -> optuna.Study:
    from emadapt.study.study import digest

    definition = definition or {"space": {"rank": [2, 4]}, "fixed": {"train": {"epochs": 3}}}
    return open_sweep(store, name, digest(definition)[:8], definition, {"a": data}, 5)[0]


def test_a_sweep_is_found_again_by_its_name(tmp_path: Path) -> None:
    first = begin(open_store())
    store = open_store()
    assert begin(store).study_name == first.study_name == find_sweep(store, "s")
    begin(store, "s2")
    assert [n[:-9] for n in sweep_names(store)] == ["s", "s2"]
    with pytest.raises(InputError, match=r"no such sweep.*one of: s, s2"):
        find_sweep(store, "s3")


def test_another_search_space_or_setting_under_the_same_name_is_refused_and_named(
    tmp_path: Path,
) -> None:
    store = open_store()
    begin(store)
    with pytest.raises(InputError, match=r"rank \[2, 4\] there, \[2, 8\] here.*--name"):
        begin(store, definition={"space": {"rank": [2, 8]}, "fixed": {"train": {"epochs": 3}}})
    with pytest.raises(InputError, match=r"train\.epochs 3 there, 9 here"):
        begin(store, definition={"space": {"rank": [2, 4]}, "fixed": {"train": {"epochs": 9}}})
    moved = {"space": {"rank": [2]}, "fixed": {"unit": {"train_set": "b"}}}
    assert difference(
        {"space": {"rank": [2, 4]}, "fixed": {"unit": {"train_set": "a"}}}, moved
    ).startswith('unit.train_set "a"')
    assert (
        difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 2}})
        == "c 2 there, absent here; d absent there, 2 here"
    )


def test_a_sweep_on_other_data_is_refused(tmp_path: Path) -> None:
    store = open_store()
    begin(store)
    with pytest.raises(InputError, match=r"trials on data {'a': 'x'}; expected data {'a': 'y'}"):
        begin(store, data="y")


def test_one_sweep_runs_once_on_a_journal(tmp_path: Path) -> None:
    store = open_store()
    again = open_store().alone("s")
    with (
        store.alone("s"),
        store.alone("other"),
        pytest.raises(InputError, match="another `emadapt sweep run` at work"),
        again,
    ):
        pass
    with store.alone("s"):
        pass


@pytest.mark.parametrize(
    ("url", "workers", "words"),
    [
        ("not a url", 1, "which is no URL"),
        ("postgresql://me:secret@host:port/x", 1, "which is no URL"),
        ("postgresql://me:sec@ret@127.0.0.1:9/x", 1, "two @.*%40"),
        ("redis://me:secret@localhost", 1, "kind 'redis'"),
        ("mysql://localhost/x", 1, "kind 'mysql'"),
        ("sqlite:///sweeps.db", 2, "sqlite for 2 workers.*PostgreSQL"),
        ("sqlite:////nowhere/at/all.db", 1, "cannot be used"),
    ],
)
def test_storages_that_will_not_do_are_refused(
    tmp_path: Path, url: str, workers: int, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_store(url, workers)
    assert "ret" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_said_within_seconds_without_the_password(
    tmp_path: Path,
) -> None:
    pytest.importorskip("psycopg2")
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be used") as caught:
        open_store("postgres://me:secret@127.0.0.1:9/sweeps")
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)
    assert "Connection refused" in str(caught.value)


@pytest.mark.slow
def test_a_machine_that_takes_the_call_and_says_nothing_is_given_up_within_10_s(
    tmp_path: Path,
) -> None:
    pytest.importorskip("psycopg2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(InputError, match=r"cannot be used.*timeout"):
            open_store(f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/sweeps")
        assert time.monotonic() - started < 10


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file in the way")
    with pytest.raises(InputError, match="cannot be written"):
        open_store()
    (tmp_path / "scratch").unlink()
    (tmp_path / "scratch/sweeps/journal.log.flock").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be written or locked"):
        open_store()
    (tmp_path / "scratch/sweeps/journal.log.flock").rmdir()
    for folder in (tmp_path, tmp_path / "scratch", tmp_path / "scratch/sweeps"):
        folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere; nobody may not
    try:
        with pytest.raises(
            InputError, match=r"scratch/sweeps: found .*Permission denied.*the right to write"
        ):
            open_store()
    finally:
        os.seteuid(user)


@pytest.mark.slow
def test_the_dashboard_opens_on_a_journal_and_gets_in_nobodys_way(tmp_path: Path) -> None:
    """Its note is written under a lock of its own, which must not be ours: it would take that for a dead one and remove it."""
    pytest.importorskip("optuna_dashboard", reason="pip install 'emadapt[dashboard]'")
    store = open_store()
    study = begin(store)
    study.add_trial(optuna.create_trial(value=0.7))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, place = Path(sys.executable).with_name("optuna-dashboard"), f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [program, "scratch/sweeps/journal.log", "--port", str(port), "--quiet"]
    )

    def ask(path: str, **request: Any) -> Any:
        with urllib.request.urlopen(
            urllib.request.Request(f"{place}{path}", **request), timeout=30
        ) as answer:
            return answer.read()

    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                page = ask("/dashboard")
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert b"<title>Optuna Dashboard</title>" in page
        (said,) = json.loads(ask("/api/studies"))["study_summaries"]
        assert said["study_name"] == study.study_name
        assert [
            t["values"] for t in json.loads(ask(f"/api/studies/{said['study_id']}"))["trials"]
        ] == [[0.7]]
        started, note = (
            time.monotonic(),
            json.dumps({"body": "the winner is odd", "version": 1}).encode(),
        )
        ask(
            f"/api/studies/{said['study_id']}/note",
            method="PUT",
            data=note,
            headers={"Content-Type": "application/json"},
        )
        assert time.monotonic() - started < 8  # it would wait 30 s for a lock that is not its own
    finally:
        server.terminate()
        server.wait(30)
    assert "the winner is odd" in Path("scratch/sweeps/journal.log").read_text()
    assert find_sweep(open_store(), "s") == study.study_name


def test_sqlite_serves_one_worker(tmp_path: Path) -> None:
    store = open_store("sqlite:///sweeps.db")
    assert begin(store).study_name in sweep_names(open_store("sqlite:///sweeps.db"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*RUN, "--trials", "0"], "--trials: found 0; expected at least 1"),
        ([*RUN, "--trials", "4", "--regime", "full"], "regime 'full'.*expected frozen, lora"),
        (["sweep", "run", "--backbone", "x", "--train-set", "a", "--trials", "4"], "backbone 'x'"),
        (["sweep", "run", "--backbone", "t", "--train-set", "b", "--trials", "4"], "train set 'b'"),
        ([*RUN, "--trials", "4", "--name", "a/b"], "--name: found 'a/b'"),
        ([*RUN, "--trials", "4", "--join"], "--join needs a storage that machines share"),
        (
            [*RUN, "--trials", "4", "--storage", "sqlite:///s.db", "--workers", "2"],
            "sqlite for 2 workers",
        ),
        ([*RUN, "--trials", "4"], "no ingested volume.*emadapt ingest a"),
        (["sweep", "promote", "--name", "s"], "no such sweep"),
        (["sweep", "promote"], "has 0 sweeps"),
        (["sweep", "status", "--name", "s"], "no such sweep"),
    ],
)
def test_wrong_words_end_with_2_and_one_line_before_any_work(
    tmp_path: Path, words: list[str], said: str
) -> None:
    make_study(tmp_path, ingested="no ingested" not in said)
    assert re.search(said, refused(*words))
    assert not list(tmp_path.glob("scratch/sweeps/*/worker*"))


def test_a_changed_space_and_changed_data_are_refused_on_the_command_line(tmp_path: Path) -> None:
    from emadapt.data.ingest import ingest
    from emadapt.study.study import load_study
    from emadapt.sweep.space import Target, definition, definition_hash
    from tiny import blobs, write_stack

    study, target = make_study(tmp_path), Target("t", "lora", "a")
    md5 = json.loads((tmp_path / "build/ingest/a/manifest.json").read_text())["md5"]
    open_sweep(
        open_store(),
        "tiny-t-lora-a",
        definition_hash(study, target),
        definition(study, target),
        {"a": md5},
        4,
    )
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings() | {"sweep": {"rank": [2, 4]}}))
    assert "rank.choices [2, 4, 8, 16, 32, 64] there, [2, 4] here" in refused(*RUN, "--trials", "4")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings()))
    (tmp_path / "data/a").rename(tmp_path / "data/old")
    write_stack(tmp_path / "data/a", *blobs((10, 90, 100), 7))
    ingest(load_study(), "a", tmp_path / "data", tmp_path / "build/ingest")
    assert f"trials on data {{'a': '{md5}'}}" in refused(*RUN, "--trials", "4")
