"""`evaluate`, the entrance: settings checked, model and data tried, then a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rai_toolbox import evaluating
from rai_toolbox.kernels._machine import own_generators
from rai_toolbox.robustness._errors import InputError, arg
from rai_toolbox.robustness._files import as_folder, claimed
from rai_toolbox.robustness.attack._corruptions import Corrupts, as_corruptions
from rai_toolbox.robustness.attack._settings import Settings
from rai_toolbox.robustness.data._maite import is_of_maite
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.report._writing import EVALUATION_FILES
from rai_toolbox.robustness.run._earlier import Earlier, by_name
from rai_toolbox.robustness.run._preparation import prepare, run_key
from rai_toolbox.robustness.run._run import Progress, Run
from rai_toolbox.robustness.session._journal import MODEL_OUTPUT, Journal
from rai_toolbox.robustness.session._team import join


def evaluate(
    model: nn.Module | Callable[[torch.Tensor], torch.Tensor],
    data: Any,
    *,
    norms: str | float | Sequence[str | float] = "l2",
    epsilons: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    extra_epsilons: Mapping[str, Sequence[float]] | None = None,
    task: str = "classification",
    bounds: Any = "auto",
    mask: Any = None,
    preprocess: Callable[[torch.Tensor], torch.Tensor] | None = None,
    output: str | None = None,
    classes: str | Path | Sequence[str] | Mapping[str, int] | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    diagnostics: bool = True,
    adaptive: bool = True,
    queries: int = 5000,
    budget: str = "standard",
    draws: int = 1,
    average: int = 1,
    corruptions: Mapping[str, Corrupts] | Sequence[Corrupts] | None = None,
    severities: Sequence[float] = (1, 2, 3, 4, 5),
    keep_points: bool = False,
    also_try: Earlier = (),
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    time_limit: float | None = None,
    progress: Progress | None = None,
    described: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure how robust a model is: its accuracy (or error) against the size of the worst perturbation.

    For each norm, the minimum-norm solver looks for the nearest error of every sample, which gives the whole
    curve; the fixed-budget solver then tries each sample a little nearer than it was broken, until it stands (a
    random model, or one without a gradient: at each reported epsilon). A sample counts as robust at an epsilon if
    neither found an error within it. Checks of the evaluation itself follow: see `Evaluation.findings`.

    The model is used in eval mode and left as it was. Under torchrun the batches are shared among the
    processes, and each returns the same result.

    Parameters
    ----------
    model : nn.Module, callable or MAITE model
        From a batch of inputs to logits, (N, classes), or (N,) or (N, 1) for two classes; for regression to
        values, (N, outputs) or (N,). Of a MAITE model the module that it holds is attacked, after both were seen to
        answer alike.
    data : (x, y), Dataset, DataLoader, MAITE dataset or Samples
        Inputs (N, ...) and labels (N,), or target values (N,) or (N, outputs).
    norms : str, number or sequence of such
        Of ``"l1"``, ``"l2"``, ``"linf"``, ``"l0"``, or their orders 1, 2, `math.inf`, 0.
    epsilons : sequence of float, or mapping from norm to such, optional
        The radii to report, in the units of the data. By default a grid that reaches to where nearly no sample stands.
    extra_epsilons : mapping from norm to sequence of float, optional
        Radii to report beside those, or beside the default grid.
    task : {"classification", "regression"}
        The kind of prediction.
    bounds : "auto", None or (lower, upper)
        Where perturbed inputs may lie: numbers, or arrays in the shape of a sample. ``"auto"`` bounds images
        by [0, 1] or [0, 255].
    mask : array of bool, optional
        In the shape of a sample: True where the input may change.
    preprocess : callable, optional
        Applied to inputs before the model; epsilon stays in the units of the data.
    output : str, optional
        Which part of what the model returns are the logits: the name of an attribute or of an entry, or the number of
        an entry. Not needed for a tensor, or where the part is called ``logits``.
    classes : path, sequence of str, or mapping from str to int, optional
        The names of the classes in the order of the model's outputs (a file with one a line, or .json), or the number
        of each. Data whose classes have names, as folders of images, get their labels by it.
    steps, restarts : int, optional
        Of the solvers; more of them can only lower the curve.
    batch_size : int
        Samples at a time. Memory grows with it; figures do not depend on it beyond rounding in the model.
    seed : int
        All random choices follow from it.
    device : torch.device or str, optional
        Where to compute; by default where the model is.
    diagnostics : bool
        Whether to check the evaluation itself.
    adaptive : bool
        Whether to attack without the gradient too, where a check doubts it.
    queries : int
        How often a model without a gradient is asked per sample and norm, at most: one that computes in numpy or under
        `torch.no_grad`, trees, a remote function. It is searched by queries alone; others are not concerned.
    budget : {"standard", "quick", "thorough"}
        How much work it is worth, where `steps`, `restarts` and `epsilons` do not say: ``"quick"`` is 10 steps and 2
        restarts, about four radii, smaller checks, none by attacks without the gradient; ``"thorough"`` 100 steps and
        27 restarts.
    draws : int
        Of a random model: gradients are averaged over so many answers, decisions are their votes. A sample counts as
        right only where the 95 % (Clopper-Pearson) interval of its probability of an error lies below one half. 1, for
        a model that answers the same each time, or at least 6.
    average : int
        How many random points of the same ball and bounds are tried per sample and epsilon, for the average beside the
        worst case: so many more forward passes. 0 measures none.
    corruptions : mapping from str to callable, or sequence of callables, optional
        Functions of a batch of inputs and a severity, which return the corrupted inputs.
    severities : sequence of float
        The severities that each corruption is tried at; one forward pass each.
    keep_points : bool
        Whether the perturbed inputs of all samples are kept, in `Evaluation.examples` and examples.npz, and not only
        those of the gallery: twice the memory of the data for each norm (regression: and radius).
    also_try : path, Evaluation, or sequence of such
        Earlier evaluations of the same samples, whose perturbed inputs are tried too, as they are and within each
        radius: the curve is not above theirs, up to rounding in the model, if the model is the same. They must have
        kept the points of all samples that they broke.
    folder : path, optional
        Where finished batches are kept, so that a run that was ended can go on. One run at a time writes there.
    resume, overwrite : bool
        Whether to go on with an unfinished run in `folder`, or to throw it away.
    time_limit : float, optional
        Seconds, after which the model is not asked any more, but for a last look at what was found; the result then
        has ``complete == False``.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` after each batch of a stage; its method ``beat``, if it has one, in
        the same way before each call of the model, where `done` counts the batch under way by its share; ``say``, if it
        has one, as ``say(words)`` with about how long it will take.
    described : mapping, optional
        Entries for the settings in the report, such as the names of model and data.

    Returns
    -------
    Evaluation
        The curves, per-sample outcomes and findings; ``.save(folder)`` writes the report.

    Raises
    ------
    InputError
        If something given cannot be used; a `ValueError` whose message is one line.
    EvaluationFailed
        If the model or another process failed in the middle, or the disk is full; finished batches are kept in
        `folder`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.robustness import evaluate
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> result = evaluate(lambda x: 3 * x, (x, x[:, 0] > 0), epsilons=[0.5], diagnostics=False)
    >>> [(point.epsilon, point.value) for point in result.curves["l2"].points]
    [(0.0, 1.0), (0.5, 0.5)]
    """
    named, earlier = as_corruptions(corruptions), by_name(also_try)
    settings = Settings.checked(
        task=task, norms=norms, epsilons=epsilons, extra_epsilons=extra_epsilons, steps=steps, restarts=restarts,
        batch_size=batch_size, seed=seed, diagnostics=diagnostics, adaptive=adaptive, queries=queries, draws=draws,
        budget=budget, average=average, corruptions=tuple(named), severities=severities,
        keep_points=keep_points, also_try=tuple(earlier),
    )  # fmt: skip
    deadline = _deadline(time_limit)
    out = None if folder is None else as_folder(folder)
    team = join()
    with contextlib.ExitStack() as stack:
        stack.callback(team.leave)
        if out is not None:
            team.together(lambda: stack.enter_context(claimed(out, EVALUATION_FILES)) if team.leads else None)
        with torch.random.fork_rng(devices=[]):
            subject, summary = team.together(
                lambda: prepare(model, data, settings, bounds, mask, preprocess, output, classes, device, earlier)
            )
            subject.corruptions, key = named, run_key(subject, summary)
        if len(set(team.gather(summary.fingerprint))) > 1:
            raise InputError("the processes were given different data: their functions must return the same in each")
        journal = team.leaders_first(lambda: _journal(out, key, team.leads, resume=resume, overwrite=overwrite))
        run = Run(subject, summary, team, journal, deadline, progress, outputs=len(key[MODEL_OUTPUT][0]))
        with evaluating(*subject.modules), torch.random.fork_rng(devices=own_generators(subject.device)):
            return run.all_stages({**_named(model=model, data=data), **(described or {})})


def _journal(out: Path | None, key: Mapping[str, Any], leads: bool, *, resume: bool, overwrite: bool) -> Journal:
    journal = Journal(out)
    begin = journal.begin if leads else journal.follow
    begin(key, resume=resume, overwrite=overwrite)
    return journal


def _named(**given: Any) -> dict[str, str]:
    """Return the ids that MAITE components have."""
    return {what: thing.metadata["id"] for what, thing in given.items() if is_of_maite(thing)}


def _deadline(time_limit: float | None) -> float | None:
    if time_limit is None:
        return None
    if not time_limit > 0:
        raise InputError(f"{arg('time_limit')} must be a number of seconds above 0, got {time_limit!r}")
    return time.monotonic() + time_limit
