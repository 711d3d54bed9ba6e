"""A PostgreSQL server of the test's own, from Debian's package."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def start(folder: Path) -> Iterator[str]:
    """Yields the URL of a fresh database; the server ends with the generator. Skips where there is no server or driver."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or [Path(p) for p in [shutil.which("postgres")] if p]
    if not found:
        pytest.skip("no PostgreSQL server: install Debian's package postgresql")
    pytest.importorskip("psycopg2", reason="no driver: pip install 'emadapt[postgres]'")
    programs = {name: str(found[-1].parent / name) for name in ("initdb", "postgres", "pg_isready", "createdb")}
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    data = Path(f"/tmp/emadapt-postgres-{os.getpid()}")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    if user:
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    initdb = [programs["initdb"], "--pgdata", str(data / "db"), "--username", "me", "--auth", "trust", "--no-sync"]
    subprocess.run(initdb, user=user, cwd=data, check=True, capture_output=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
    command = [programs["postgres"], "-D", str(data / "db"), "-p", str(port), "-k", str(data), "-c", "listen_addresses=127.0.0.1"]
    with (folder / "postgres.log").open("wb") as log:
        server = subprocess.Popen(command, user=user, cwd=data, stdout=log, stderr=log, env={"LC_ALL": "C"})
    try:
        ready = [programs["pg_isready"], "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert server.poll() is None, (folder / "postgres.log").read_text()
        create = [programs["createdb"], "-h", "127.0.0.1", "-p", str(port), "-U", "me", "sweeps"]
        subprocess.run(create, check=True, capture_output=True)
        yield f"postgresql://me:secret@127.0.0.1:{port}/sweeps"
    finally:
        server.send_signal(signal.SIGINT)  # does not wait for clients
        server.wait(30)
        shutil.rmtree(data, ignore_errors=True)
