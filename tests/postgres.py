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


class Server:
    """A fresh database; skips where there is no server or driver.

    Attributes:
        url: of the database.
    """

    def __init__(self, log: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or [
            Path(p) for p in [shutil.which("postgres")] if p
        ]
        if not found:
            pytest.skip("no PostgreSQL server: install Debian's package postgresql")
        pytest.importorskip("psycopg2", reason="no driver: pip install 'emadapt[postgres]'")
        self.binaries, self.log = found[-1].parent, log
        self.user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
        self.data = Path(f"/tmp/emadapt-postgres-{os.getpid()}")
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir()
        if self.user:
            os.chown(self.data, pwd.getpwnam(self.user).pw_uid, -1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.url = f"postgresql://me:secret@127.0.0.1:{self.port}/sweeps"
        words = f"--pgdata {self.data}/db --username me --auth trust --no-sync".split()
        subprocess.run(
            [self._program("initdb"), *words],
            user=self.user,
            cwd=self.data,
            check=True,
            capture_output=True,
        )
        self.start()
        subprocess.run(
            [self._program("createdb"), *self._here, "-U", "me", "sweeps"],
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        words = f"-D {self.data}/db -p {self.port} -k {self.data}".split()
        words += ["-c", "listen_addresses=127.0.0.1"]
        with self.log.open("ab") as log:
            command = [self._program("postgres"), *words]
            self.process = subprocess.Popen(
                command, user=self.user, cwd=self.data, stdout=log, stderr=log
            )
        while subprocess.run(
            [self._program("pg_isready"), *self._here, "-t", "1"], capture_output=True, check=False
        ).returncode:
            assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # does not wait for clients
        self.process.wait(60)

    @property
    def _here(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", self.port]

    def _program(self, name: str) -> str:
        return str(self.binaries / name)


def serve(folder: Path) -> Iterator[Server]:
    """For a fixture: a server that ends with the test."""
    server = Server(folder / "postgres.log")
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.data, ignore_errors=True)
