"""The sweep's own run in MLflow, above those of its trials: the best so far, and figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from emadapt.study.study import Study
from emadapt.sweep.space import Target, definition
from emadapt.sweep.storage import FOLDER, best_trial, first_number, n_ended
from emadapt.tracking.provenance import provenance_tags
from emadapt.tracking.run import Run

MIN_IMPORTANCE = 4
"""Finished trials below which importance says nothing."""


def sweep_run(config: Study, target: Target, name: str) -> Run:
    """The run of the sweep with this full name; a resumed sweep goes on with its own."""
    tags = {
        **provenance_tags(Path()),
        "unit": name[:-9],
        "sweep.parent": name,
        "stage": "sweep",
        "study": config.name,
        **asdict(target),
    }
    params = {
        "space": definition(config, target)["space"],
        "sampler": config.sweep.sampler,
        "pruner": config.sweep.pruner,
    }
    return Run(config.name, name[:-9], tags, params, same=("sweep.parent",))


def progress(trials: list[FrozenTrial]) -> dict[str, float]:
    """Numbers of trials by state; the best trial with those of its settings that are numbers."""
    numbers: dict[str, float] = {
        f"trials.{state.name.lower()}": sum(trial.state == state for trial in trials)
        for state in TrialState
    }
    if best := best_trial(trials):
        found = {"val_iou": best.value, "trial": first_number(best), **best.params}
        numbers |= {f"best.{k}": v for k, v in found.items() if isinstance(v, int | float)}
    return numbers


def add_result(run: Run, study: optuna.Study) -> None:
    """Add the best settings, and those of Optuna's figures that the trials allow."""
    trials = study.get_trials(deepcopy=False)
    run.log(progress(trials), n_ended(trials))
    best = best_trial(trials)
    if best is None:
        return
    run.results |= {f"best.{name}": value for name, value in best.params.items()}
    run.results["best.trial"] = first_number(best)

    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as figures

    plots = {
        "history": figures.plot_optimization_history,
        "intermediate": figures.plot_intermediate_values,
    }
    values = [trial.value for trial in trials if trial.state == TrialState.COMPLETE]
    if len(values) >= MIN_IMPORTANCE and len(set(values)) > 1:
        plots["importance"] = figures.plot_param_importances
    for name, plot in plots.items():
        file = FOLDER / study.study_name / f"{name}.png"
        plot(study)
        plt.savefig(file, bbox_inches="tight")
        plt.close("all")
        run.artifacts[f"figures/{file.name}"] = file
