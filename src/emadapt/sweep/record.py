"""The sweep's own run in MLflow, above those of its trials: the best so far, and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from emadapt.study.study import Study
from emadapt.sweep.space import Target, described, search_space
from emadapt.sweep.storage import FOLDER, best_trial, first_number, n_ended
from emadapt.tracking.provenance import provenance_tags
from emadapt.tracking.run import Run
from emadapt.tracking.views import NOTE

DESCRIPTION = """Sweep of the regime `{regime}` on the backbone `{backbone}` and the training set
`{train_set}`, over {searched}. The runs below are its trials: each trains the unit with other
values, and is scored on validation slices alone.

`best.*` are the best trial and its values, `trials.*` numbers of trials by state.
Figures are under **Artifacts**, most of them from four finished trials on."""
"""Of a sweep's run in MLflow."""
FEW = 4
"""Finished trials below which comparing them says nothing."""


def sweep_run(config: Study, target: Target, name: str) -> Run:
    """The run of the sweep with this full name; a resumed sweep goes on with its own."""
    searched = described(search_space(config, target))
    tags = {
        **provenance_tags(Path()),
        NOTE: DESCRIPTION.format(**asdict(target), searched=", ".join(searched)),
        "unit": name[:-9],
        "sweep.parent": name,
        "stage": "sweep",
        "study": config.name,
        **asdict(target),
    }
    params = {"space": searched, "pruner": config.sweep.pruner}
    return Run(config.name, name[:-9], tags, params, same=("sweep.parent",))


def progress(trials: list[FrozenTrial]) -> dict[str, float]:
    """Numbers of trials by state; the best trial with those of its settings that are numbers."""
    numbers: dict[str, float] = {
        f"trials.{state.name.lower()}": sum(trial.state == state for trial in trials)
        for state in TrialState
    }
    if best := best_trial(trials):
        found = {"val_score": best.value, "trial": first_number(best), **best.params}
        numbers |= {f"best.{k}": v for k, v in found.items() if isinstance(v, int | float)}
    return numbers


def add_result(run: Run, study: optuna.Study) -> None:
    """Add the numbers of trials at the end, the best settings, and Optuna's figures."""
    trials = study.get_trials(deepcopy=False)
    run.log(progress(trials), n_ended(trials))
    if best := best_trial(trials):
        run.results |= {f"best.{name}": value for name, value in best.params.items()}
        run.results["best.trial"] = first_number(best)
        files = draw(study, FOLDER / study.study_name)
        run.artifacts |= {f"figures/{file.name}": file for file in files}


def draw(study: optuna.Study, folder: Path) -> list[Path]:
    """Write Optuna's figures of a sweep; those that compare trials need a few with other values."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as figures

    plots: list[Callable[..., Any]] = [figures.plot_optimization_history]
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) >= FEW and len({trial.value for trial in finished}) > 1:
        plots += [figures.plot_param_importances, figures.plot_slice]
    files = []
    for plot in plots:
        plot(study, target_name="validation score")
        files.append(folder / f"{plot.__name__.removeprefix('plot_')}.png")
        plt.savefig(files[-1], bbox_inches="tight")
        plt.close("all")
    return files
