"""docs/clusters.md: every script is one that SLURM takes, and together they do on a tiny study what the document says.

The scheduler is the stand-in of slurm.py; the commands are those of the document, word for word but for the sizes in `SMALLER`.
"""

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import slurm
from emadapt.cli import main
from emadapt.study.study import load_study
from emadapt.sweep.claims import n_ended
from project import SAFE_SETTINGS
from test_sweep_run import check_lab_book, check_sweep, owners, trials_of
from tiny import make_study, settings

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)
SCRIPTS = {
    text.splitlines()[1].removeprefix("# "): text
    for text in BLOCKS
    if text.startswith("#!/bin/bash\n# slurm/")
}
COMMANDS = [text for text in BLOCKS if text not in SCRIPTS.values()]
SMALLER = {"--array=0-7": "--array=0-1", "--trials 100": "--trials 6"}


def commands_with(script: str) -> str:
    """The block of the document that submits a script, on a smaller scale."""
    (found,) = [text for text in COMMANDS if script in text]
    for large, small in SMALLER.items():
        found = found.replace(large, small)
    return found


# -- what can be seen without running anything


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_one_that_bash_and_slurm_take(name: str) -> None:
    text = SCRIPTS[name]
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    options = slurm.directives(text)
    if name != "slurm/environment.sh":
        assert {"job-name", "output", "mem", "time"} <= options.keys()
        assert options["output"].startswith("scratch/slurm/")
    if "again emadapt" in text:
        assert options["signal"].startswith("B:USR1@")
        assert {"requeue", "open-mode"} <= options.keys()
    assert set(re.findall(r"slurm/[\w.-]+", "\n".join(BLOCKS))) == set(SCRIPTS)


def test_commands_exist_with_their_options_and_settings_are_the_safe_ones() -> None:
    text = re.sub(
        r"\$\(([^()]*)\)",
        r"\n\1\n",
        "\n".join(BLOCKS).replace("--array=0-7", "").replace("\\\n", " "),
    )
    lines = [line.split("#")[0].split("|")[0].strip() for line in text.splitlines()]
    calls = [
        shlex.split(line.removeprefix("again "))
        for line in lines
        if re.match(r"(again )?emadapt ", line)
    ]
    assert len(calls) > 6
    for words in calls:
        command: click.Command = main
        for word in words[1:]:
            if not isinstance(command, click.Group):
                break
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
    swept = main.commands["sweep"].commands["run"]  # type: ignore[attr-defined]
    known = {option for parameter in swept.params for option in parameter.opts}
    submitted = [
        line.rpartition(".sbatch")[2]
        for line in "\n".join(COMMANDS).splitlines()
        if "--backbone" in line
    ]
    assert len(submitted) == 2
    assert all(set(re.findall(r"--[\w-]+", words)) <= known for words in submitted)
    assert all(
        f"{name}={value}" in SCRIPTS["slurm/environment.sh"]
        for name, value in SAFE_SETTINGS.items()
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("#SBATCH --gpu=1", "unrecognized option '--gpu'"),
        ("#SBATCH --time=8h", "invalid value '8h' for --time"),
        ("#SBATCH --signal=USR1@120", "invalid value"),
        ("cd somewhere\n#SBATCH --mem=2G", "after a command"),
    ],
)
def test_the_stand_in_refuses_what_slurm_would_refuse_or_ignore(line: str, said: str) -> None:
    with pytest.raises(slurm.SlurmError, match=re.escape(said)):
        slurm.directives(f"#!/bin/bash\n{line}\ntrue\n")
    with pytest.raises(slurm.SlurmError, match="#!"):
        slurm.directives("true\n")


def test_units_are_printed_in_the_order_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(tmp_path, ingested=False)
    assert CliRunner().invoke(main, ["units"]).output.splitlines() == [
        u.name for u in study.units()
    ]


# -- what happens when they run


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with the scripts of the document and a tiny study; the backbone and training set have the document's names."""
    root = Path(tempfile.mkdtemp(prefix="emadapt-cluster-"))
    root.chmod(0o755)  # the database server is another user
    monkeypatch.chdir(root)
    params = settings(epochs=3, steps_per_epoch=4)
    params["backbones"] = {"dinov2_s": params["backbones"]["t"]}
    params["study"] |= {"backbones": ["dinov2_s"], "train_sets": ["paired"]}
    make_study(root, params)
    for name, text in SCRIPTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    for name, value in slurm.install(root / "fake").items():
        monkeypatch.setenv(name, value)
    for name in ("EMADAPT_TRACKING", "OMP_NUM_THREADS", "EMADAPT_SWEEP_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    yield root
    slurm.end(root / "fake")
    shutil.rmtree(root, ignore_errors=True)


def submit(text: str) -> None:
    done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def until(condition: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.2)


def logs() -> str:
    return "\n".join(
        f"--- {p.name}\n{p.read_text()}" for p in sorted(Path("scratch/slurm").glob("*.log"))
    )


def test_what_the_time_limit_ends_is_queued_again_and_what_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/environment.sh").write_text(SCRIPTS["slurm/environment.sh"])
    wanted = ("--job-name=j", "--signal=B:USR1@120", "--output=%x.log", "--open-mode=append")
    first = "bash -c 'trap \"sleep 0.3; exit 3\" TERM; touch begun; for i in {1..600}; do sleep 0.1; done'"
    choice = (
        f'if [ "$SLURM_RESTART_COUNT" = 0 ]; then again {first}; else again bash -c "exit 7"; fi'
    )
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in wanted),
        ". slurm/environment.sh",
        choice,
    ]
    (tmp_path / "job.sbatch").write_text("\n".join(lines) + "\n")
    for name, value in slurm.install(tmp_path / "fake").items():
        monkeypatch.setenv(name, value)
    submit("sbatch job.sbatch")
    until(lambda: Path("begun").exists())
    time.sleep(0.3)  # until the traps are set
    slurm.near_limit(tmp_path / "fake")
    (done,) = slurm.wait(tmp_path / "fake", 40).values()  # it would sleep for 60
    assert (done["state"], done["codes"], done["restarts"]) == ("FAILED", {"0": 7}, {"0": 1}), Path(
        "j.log"
    ).read_text()


@pytest.mark.slow
def test_an_array_trains_the_units_and_the_last_job_finds_them_trained(cluster: Path) -> None:
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, name)
    submit(
        "git init -q && dvc init -q && dvc add -q data".replace(
            "dvc", f"{Path(sys.executable).parent}/dvc"
        )
    )
    submit(commands_with("slurm/train.sbatch"))
    done = slurm.wait(cluster / "fake", 1500)
    assert {j["name"]: j["state"] for j in done.values()} == {
        "emadapt-prepare": "COMPLETED",
        "emadapt-train": "COMPLETED",
        "emadapt-report": "COMPLETED",
    }, logs()
    units = [u.name for u in load_study().units()]
    assert len(next(j for j in done.values() if j["name"] == "emadapt-train")["codes"]) == len(
        units
    )
    summary = json.loads(Path("reports/summary.json").read_text())
    assert {u["regime"] for u in summary["units"]} == {"frozen", "lora"}
    status = subprocess.run(
        [f"{Path(sys.executable).parent}/dvc", "status"], capture_output=True, text=True, check=True
    ).stdout
    assert "up to date" in status
    from mlflow import MlflowClient

    from emadapt.tracking.tracker import tracking_uri

    client = MlflowClient(tracking_uri(cluster))
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.data.tags["unit"] for r in runs) == sorted(units), (
        "the last job has gone on with the array's runs"
    )
    for run in runs:
        unit = run.data.tags["unit"]
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "val/iou")) == 3
        trained = next(
            Path("scratch/slurm").glob(f"emadapt-train-*_{units.index(unit)}.log")
        ).read_text()
        again = Path(f"scratch/repro/train@{unit}.log").read_text()
        said = [
            re.findall(rf"train {unit}: (val IoU .*?), [\d,]+ trained", text)[0]
            for text in (trained, again)
        ]
        assert said[0] == said[1], "the last job has trained another model"


@pytest.mark.slow
def test_a_sweep_on_one_node_goes_on_after_its_time_limit(cluster: Path) -> None:
    submit(commands_with("slurm/sweep-node.sbatch"))
    until(lambda: n_ended(trials_of()) >= 2)
    slurm.near_limit(cluster / "fake")
    (done,) = slurm.wait(cluster / "fake", 1500).values()
    assert (done["state"], done["restarts"]) == ("COMPLETED", {"0": 1}), logs()
    ended = check_sweep(trials_of(), 6)
    check_lab_book(cluster, trials_of(), ended)
    assert "sweep: stopped; run it again to go on" in logs()
    assert len(owners(trials_of())) == 2


@pytest.mark.postgres
def test_an_array_works_on_one_sweep_in_the_database_of_another_job(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        pytest.skip("no PostgreSQL server: install Debian's package postgresql")
    folder = cluster / "scratch/postgres"
    folder.mkdir(parents=True)
    if os.geteuid() == 0:  # the server refuses to run as root
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        monkeypatch.setenv("FAKE_SLURM_USER", "emadapt-postgres=postgres")
    end = "\n".join(
        line
        for line in SCRIPTS["slurm/sweep-end.sbatch"].splitlines()
        if not line.startswith("scancel")
    )
    script = f'{end}\n{sys.executable} -c "import test_clusters; test_clusters.note_trials()"\nscancel "$1"\n'
    Path("slurm/sweep-end.sbatch").write_text(
        script
    )  # looks at the trials while the server is there
    monkeypatch.setenv(
        "PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    submit(commands_with("slurm/sweep-end.sbatch"))
    done = slurm.wait(cluster / "fake", 1500)
    assert {j["name"]: j["state"] for j in done.values()} == {
        "emadapt-postgres": "COMPLETED",
        "emadapt-sweep": "COMPLETED",
        "emadapt-sweep-end": "COMPLETED",
    }, logs()
    assert not (folder / "url").exists()
    assert (folder / "db").stat().st_mode & 0o077 == 0
    noted = json.loads(Path("trials.json").read_text())
    assert (noted["ended"], noted["machines"]) == (6, 2)
    password = (folder / "password").read_text()
    assert len(password) == 48
    assert password not in logs()
    assert (
        "lora_tuned" in yaml.safe_load(Path("params.yaml").read_text())["regimes"]
        or "unchanged" in logs()
    )


def note_trials() -> None:
    """Run by the last job of the test above."""
    trials = trials_of(os.environ["EMADAPT_SWEEP_STORAGE"])
    ended = check_sweep(trials, 6)
    check_lab_book(Path(), trials, ended)
    Path("trials.json").write_text(
        json.dumps({"ended": len(ended), "machines": len(owners(trials))})
    )
