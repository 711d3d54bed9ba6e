"""Nothing listens beyond this machine, and no password is written down.

That nothing of a stranger runs is checked by ruff (rules S and TID251) and by tests/corpus.
"""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from emadapt.cli import main
from emadapt.tracking.redact import redact
from tiny import make_study

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SECRET = "hunter2"
WORDS = st.text("abcXYZ019_-.~%/@:!$", min_size=1, max_size=12)


def test_servers_listen_on_this_machine_alone():
    everywhere = re.compile(r"0\.0\.0\.0|\[::\]|host=[\"']{2}|[\"']::[\"']")
    texts = [path.read_text() for path in [*SOURCES, ROOT / "Makefile"]]
    assert not [text for text in texts if everywhere.search(text)]
    assert re.findall(r"--host[= ](\S+)", texts[-1]) == ["127.0.0.1"]
    clusters = re.findall(r"LocalCluster\(([^)]*)\)", "".join(texts))
    assert clusters
    assert all('host="127.0.0.1"' in cluster for cluster in clusters)


# -- passwords


@given(user=WORDS, password=WORDS, host=st.sampled_from(["db", "127.0.0.1:5432", "h.example.org"]))
def test_a_password_is_taken_out_wherever_the_url_stands(user, password, host):
    """Also one with / and @ in it, which people forget to encode."""
    secret = f"{SECRET}{password}"
    url = f"postgresql://{user}:{secret}@{host}/name"
    for text in (url, f"cannot reach {url}: refused", f"'{url}'", f"storage={url}, next"):
        assert SECRET not in redact(text)
        assert f"@{host}/name" in redact(text)


@given(
    password=WORDS,
    key=st.sampled_from(["password", "PASSWORD", "sslpassword", "pwd", "token", "access_token"]),
)
def test_a_password_among_parameters_is_taken_out_and_json_stays_json(password, key):
    value = {
        "storage": f"https://host/db?a=1&{key}={SECRET}{password}",
        "dsn": f"host=x {key}={SECRET} user=me",
        "next": [1],
    }
    redacted = redact(json.dumps(value))
    assert SECRET not in redacted
    assert json.loads(redacted)["next"] == [1]


def test_what_holds_no_password_stays():
    for text in ("me@host", "https://host/path", "a: b@c", "sqlite:////tmp/x.db"):
        assert redact(text) == text


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:9/sweeps",
        f"postgresql://127.0.0.1:9/sweeps?user=me&password={SECRET}",
        f"mysql://me:{SECRET}@127.0.0.1/sweeps",
        f"me:{SECRET}@127.0.0.1",
        f"postgresql://me:{SECRET}@@127.0.0.1:9/sweeps",
        f"sqlite:////nowhere/{'x' * 5}/a.db?password={SECRET}",
    ],
)
def test_no_verb_says_the_password_of_a_storage(url, tmp_path, tracking_off, monkeypatch):
    make_study(tmp_path)
    target = ("--backbone", "t", "--train-set", "a", "--trials", "1")
    for words in (("sweep", "run", *target), ("sweep", "status"), ("sweep", "promote")):
        for given_by in (("--storage", url), ()):
            monkeypatch.setenv("EMADAPT_SWEEP_STORAGE", "" if given_by else url)
            result = CliRunner().invoke(main, [*words, *given_by])
            assert result.exit_code == 2, result.output
            assert SECRET not in result.output + str(result.exception), result.output
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
