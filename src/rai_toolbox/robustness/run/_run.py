"""The order of a run. Every batch is kept before the next one begins.

The stages: the unperturbed samples; in each norm the search, earlier points, a try below each nearest error;
the checks; attacks without the gradient, where a check doubts it; random points; corruptions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from rai_toolbox.perturbations._resuming import SolveEnded
from rai_toolbox.robustness._errors import EvaluationFailed, InputError, WriteFailed, arg
from rai_toolbox.robustness._results import Finding
from rai_toolbox.robustness._text import one_line
from rai_toolbox.robustness.attack._earlier import try_earlier
from rai_toolbox.robustness.attack._grid import grid_for_distances, grid_for_spread, widest_radius
from rai_toolbox.robustness.attack._settings import Norm
from rai_toolbox.robustness.attack._stages import clean, confirm, search
from rai_toolbox.robustness.attack._stronger import STRONGER, stronger
from rai_toolbox.robustness.attack._subject import Subject
from rai_toolbox.robustness.checks._agreement import AGREEMENT, asks_for_more, judged
from rai_toolbox.robustness.checks._checks import CheckContext, run_check
from rai_toolbox.robustness.checks._model_checks import MODEL_CHECKS
from rai_toolbox.robustness.checks._probes import PROBES
from rai_toolbox.robustness.checks._rivals import RIVALS
from rai_toolbox.robustness.checks._search_checks import SEARCH_CHECKS
from rai_toolbox.robustness.data._samples import Summary
from rai_toolbox.robustness.report._evaluation import Evaluation
from rai_toolbox.robustness.run._assembly import (
    Measured,
    Pieces,
    after_earlier,
    assemble,
    attacks_of,
    class_names,
    joined,
    reached,
    scattered,
    total,
    worst_errors,
)
from rai_toolbox.robustness.run._averaging import corruptions_of, with_average
from rai_toolbox.robustness.run._curves import accuracy_curve, error_curve
from rai_toolbox.robustness.run._estimate import estimate
from rai_toolbox.robustness.run._rates import error_rates
from rai_toolbox.robustness.session._journal import Journal, Piece
from rai_toolbox.robustness.session._team import Team

Made = TypeVar("Made")

#: Called as ``progress(stage, done, total)`` after each finished batch of a stage.
Progress = Callable[[str, int, int], None]

CHECKS = (*MODEL_CHECKS, *PROBES, *SEARCH_CHECKS, *RIVALS, *AGREEMENT)


@dataclass
class Run:
    """One evaluation under way."""

    # subject, summary: the model, data and settings; statistics of the data
    subject: Subject
    summary: Summary
    # team, journal: who shares the work, and where finished pieces are kept
    team: Team
    journal: Journal
    # Of `time.monotonic`: the model is not asked after it, but for a last look at what was found.
    deadline: float | None
    # Told of each finished batch; its method ``beat``, if it has one, of each call of the model, with the share of the
    # batch that is done; its method ``say``, if it has one, of the cost, in words.
    progress: Progress | None
    outputs: int  # of the model
    complete: bool = True  # whether no batch has been left out so far
    begun: float = field(default_factory=time.perf_counter)  # of `time.perf_counter`
    _at: tuple[str, int, int] = ("Looking at the model", 0, 1)

    def all_stages(self, described: Mapping[str, Any]) -> Evaluation:
        """Do all that is not done yet, and return the result."""
        subject = self.subject
        subject.late = self._late
        subject.model.called = self._called
        clean_pieces = self._stage("clean", "Looking at the model", lambda batch: clean(subject, batch))
        finite = joined(clean_pieces, "finite")
        if len(finite) and not finite.any():
            raise InputError("the model's output is NaN or infinite for every sample")
        self._say_cost(clean_pieces)
        measure = self._accuracies if subject.classifies else self._errors
        outcomes = {norm: measure(norm, clean_pieces) for norm in subject.settings.norms}
        by_norm = {norm: measured for norm, measured in outcomes.items() if measured is not None}
        if not by_norm:
            raise EvaluationFailed(
                f"the time limit came before the first batch was done; go on with {arg('resume', True)}"
            )
        findings = self._checks(by_norm, clean_pieces) if subject.settings.diagnostics else ()
        adaptive = subject.settings.adaptive and subject.settings.sizes.adaptive and subject.has_gradient
        if subject.classifies and adaptive and asks_for_more(findings) and self.complete:
            by_norm, findings = self._stronger(by_norm, findings)
        by_norm = {
            norm: with_average(subject, norm, by_norm[norm], self._stage)
            for norm in subject.settings.norms
            if norm in by_norm
        }
        corruptions = corruptions_of(subject, clean_pieces, self._stage)
        random = subject.classifies and subject.settings.draws > 1
        rates = {norm: error_rates(subject, clean_pieces, found) for norm, found in by_norm.items() if random}
        return assemble(
            subject, self.summary, clean_pieces, by_norm, findings, corruptions, rates,
            complete=self.complete, described=described, seconds=time.perf_counter() - self.begun,
            processes=self.team.size,
        )  # fmt: skip

    def _say_cost(self, clean_pieces: Pieces) -> None:
        """Tell, before the attacks begin, about how long they and the checks take."""
        say = getattr(self.progress, "say", None)
        if say is None or not self.team.leads or not all(clean_pieces) or not self.subject.has_gradient:
            return
        settings = self.subject.settings
        known = joined(clean_pieces, "correct" if self.subject.classifies else "error")
        right = int(known.sum()) if self.subject.classifies else len(known)
        names = [f"search-{settings.norms[0]}-{batch:07d}" for batch in range(self.subject.batches)]
        left = sum(self.journal.get(name) is None for name in names) / len(names)
        if right:
            with self.subject.last_word(now=True):
                cost = _guarded(
                    lambda: estimate(self.subject, right, self.outputs, share_left=left, processes=self.team.size)
                )
            say(str(cost))

    def _stage(self, name: str, words: str, work: Callable[[int], Mapping[str, Any] | None]) -> Pieces:
        """Do the batches that are not done yet, each in one of the processes; return all that are done, or
        None for the others. A batch that the time limit has ended has an entry ``cut``; of it the journal keeps what a
        later run goes on from.
        """
        cut: dict[str, Piece] = {}
        names = [f"{name}-{batch:07d}" for batch in range(self.subject.batches)]
        mine = self.team.mine(len(names))
        for done, batch in enumerate(mine):
            if self._late():
                break
            self._at = words, done, len(mine)
            if self.journal.get(names[batch]) is None:
                self.subject.cut = False
                self.subject.begin(math.inf)
                # A random model draws the same numbers for a batch in any process and order.
                torch.manual_seed(self.subject.generator(names[batch]).initial_seed())
                self.subject.part = self.journal.part_of(names[batch])
                try:
                    piece = _guarded(lambda batch=batch: work(batch))
                except SolveEnded:
                    break
                finally:
                    self.subject.part = None
                if piece is None:
                    continue
                if self.subject.cut:
                    cut[names[batch]] = {name: np.asarray(value) for name, value in piece.items()}
                    cut[names[batch]]["cut"] = np.array(True)
                    break
                self.journal.put(names[batch], piece)
            self._tell(words, done + 1, len(mine))
        own = {names[batch]: piece for batch in mine if (piece := self.journal.get(names[batch])) is not None}
        for pieces in self.team.gather(own):
            self.journal.learn(pieces)
        results = [self.journal.get(name) for name in names]
        self.complete &= all(result is not None for result in results)
        for pieces in self.team.gather(cut):
            results = [pieces.get(name, result) for name, result in zip(names, results, strict=True)]
        return results

    def _called(self) -> None:
        """Tell that the model is called, for a batch may take long, and end the work if the time limit has come."""
        beat = getattr(self.progress, "beat", None)
        if beat is not None and self.team.leads:
            words, done, total = self._at
            beat(words, done + self.subject.done, total)
        self.subject.watch()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _tell(self, words: str, done: int, count: int) -> None:
        if self.progress is not None and self.team.leads:
            self.progress(words, done, count)

    def _accuracies(self, norm: Norm, clean_pieces: Pieces) -> Measured | None:
        """Search the nearest error of each sample, then try each sample below that.

        Returns None where the time limit came before the first batch.
        """
        subject = self.subject

        def search_batch(batch: int) -> Mapping[str, Any] | None:
            first = clean_pieces[batch]
            return None if first is None else search(subject, norm, batch, first["correct"])

        searched = self._stage(f"search-{norm}", f"Searching the nearest errors ({norm})", search_batch)
        # What the time limit has cut is weaker than the rest, and better than nothing.
        searched = _whole(searched) if any(_whole(searched)) else searched
        if not any(searched):
            return None
        nearest = joined(searched, "distance")
        widest = widest_radius(norm, self.summary, subject.box, subject.samples.shape)
        grid = subject.settings.grid(norm) or grid_for_distances(norm, nearest, widest, subject.settings.sizes.radii)
        grid = subject.settings.with_extra(norm, grid)
        tried = self._earlier(norm, grid, searched)
        known = [second or first for first, second in zip(searched, tried, strict=True)]

        def confirm_batch(batch: int) -> Mapping[str, Any] | None:
            found = known[batch]
            return None if found is None else confirm(subject, norm, batch, grid, found["distance"])

        confirmed = self._stage(f"confirm-{norm}", f"Trying each epsilon ({norm})", confirm_batch)
        distance = joined([second or first for first, second in zip(known, confirmed, strict=True)], "distance")
        where = reached(subject, searched)
        stages = {"search": searched, **({"also_try": tried} if any(tried) else {}), "confirm": confirmed}
        curve = accuracy_curve(
            norm, grid, distance, nearest, subject.targets[where], class_names(subject),
            by_earlier=after_earlier(stages), forwards=sum(total("forwards", pieces) for pieces in stages.values()),
            confirmed=all(_whole(confirmed)),
        )  # fmt: skip
        outcome, by = (
            scattered(values, where, len(subject.samples))
            for values in (distance, attacks_of(searched, tried, confirmed))
        )
        return Measured(curve, outcome, stages, by)

    def _earlier(self, norm: Norm, grid: tuple[float, ...], before: Pieces) -> Pieces:
        """Try the points of earlier evaluations, if there are any, on the batches that were reached."""
        subject = self.subject
        if norm not in subject.earlier:
            return [None] * subject.batches

        def try_batch(batch: int) -> Mapping[str, Any] | None:
            found = before[batch]
            known = found["distance"] if found is not None and subject.classifies else None
            return None if found is None else try_earlier(subject, norm, batch, grid, known)

        return self._stage(f"also-{norm}", f"Trying earlier points ({norm})", try_batch)

    def _errors(self, norm: Norm, clean_pieces: Pieces) -> Measured | None:
        """Try each radius on all samples: a regression has no errors to search for.

        Returns None where the time limit came before the first batch.
        """
        subject = self.subject
        grid = subject.settings.grid(norm) or grid_for_spread(
            norm, self.summary, subject.box, subject.settings.sizes.radii
        )
        grid = subject.settings.with_extra(norm, grid)

        def confirm_batch(batch: int) -> Mapping[str, Any] | None:
            return None if clean_pieces[batch] is None else confirm(subject, norm, batch, grid, None)

        confirmed = _whole(self._stage(f"confirm-{norm}", f"Trying each epsilon ({norm})", confirm_batch))
        if not any(confirmed):
            return None
        tried = self._earlier(norm, grid, confirmed)
        parts = zip(clean_pieces, confirmed, tried, strict=True)
        found = [worst_errors(first["error"], second, third) for first, second, third in parts if first and second]
        error, by = (np.concatenate(values, axis=1) for values in zip(*found, strict=True))
        curve = error_curve(norm, grid, error, total("forwards", (*confirmed, *tried)), all(confirmed))
        where, count = reached(subject, confirmed), len(subject.samples)
        stages = {"confirm": confirmed, **({"also_try": tried} if any(tried) else {})}
        return Measured(curve, scattered(error, where, count), stages, scattered(by, where, count))

    def _stronger(
        self, by_norm: Mapping[str, Measured], findings: tuple[Finding, ...]
    ) -> tuple[dict[str, Measured], tuple[Finding, ...]]:
        """Attack without the gradient, which is in doubt; the curve is the lowest of all that was found."""
        subject = self.subject
        width = self.summary.maximum - self.summary.minimum or 1.0
        lower: dict[str, Measured] = {}
        attacks, grids = {}, {}
        for norm in subject.settings.norms:
            if norm not in by_norm:
                continue
            before = by_norm[norm]
            grid = tuple(point.epsilon for point in before.curve.points[1:])

            def attack_batch(
                batch: int, norm: Norm = norm, grid: tuple[float, ...] = grid, before: Measured = before
            ) -> Mapping[str, Any]:
                start, stop = subject.span(batch)
                return stronger(subject, norm, batch, grid, before.outcome[start:stop], width)

            try:
                pieces = self._stage(f"stronger-{norm}", f"Attacking without the gradient ({norm})", attack_batch)
            except WriteFailed:
                raise
            except EvaluationFailed:  # a model that takes no batch of another size, say: what was found stays doubted
                return dict(by_norm), findings
            if not all(_whole(pieces)):
                return dict(by_norm), findings
            distance = joined(pieces, "distance")
            grids[norm] = grid
            attacks[norm] = {"the solvers": before.outcome} | {name: joined(pieces, name) for name in STRONGER}
            curve = accuracy_curve(
                norm, grid, distance, joined(before.stages["search"], "distance"), subject.targets,
                class_names(subject), by_earlier=after_earlier(before.stages), by_solvers=before.outcome,
                confirmed=before.curve.confirmed,
                forwards=total("forwards", pieces) + before.curve.forwards_per_sample * len(distance),
            )  # fmt: skip
            found_by = joined(pieces, "by")
            by = np.where(found_by != "", found_by, before.by)
            lower[norm] = Measured(curve, distance, {**before.stages, "stronger": pieces}, by, before.outcome)
        return lower, judged(findings, attacks, grids)

    def _checks(self, by_norm: Mapping[str, Measured], clean_pieces: Pieces) -> tuple[Finding, ...]:
        outcome = {norm: measured.outcome for norm, measured in by_norm.items()}
        context = CheckContext(
            subject=self.subject,
            summary=self.summary,
            curves={norm: measured.curve for norm, measured in by_norm.items()},
            distance=outcome if self.subject.classifies else {},
            error={} if self.subject.classifies else outcome,
            clean=joined(clean_pieces, "correct" if self.subject.classifies else "error"),
            rejected=int(
                sum(total("rejected", pieces) for measured in by_norm.values() for pieces in measured.stages.values())
            ),
            # Each forward pass of a solver goes back as well.
            spent=2
            * sum(total("forwards", pieces) for measured in by_norm.values() for pieces in measured.stages.values()),
        )
        mine = self.team.mine(len(CHECKS))
        findings: dict[str, Finding] = {}
        for done, position in enumerate(mine):
            check = CHECKS[position]
            self._at = "Checking the evaluation itself", done, len(mine)
            findings[check.name] = run_check(check, context, self.journal, skip=self._late() or not self.complete)
            self._tell("Checking the evaluation itself", done + 1, len(mine))
        for others in self.team.gather(findings):
            findings |= others
        return tuple(findings[check.name] for check in CHECKS if check.name in findings)


def _whole(pieces: Pieces) -> Pieces:
    """Return the pieces, None for those that the time limit has cut."""
    return [piece if piece and "cut" not in piece else None for piece in pieces]


def _guarded(work: Callable[[], Made]) -> Made:
    try:
        return work()
    except (InputError, EvaluationFailed, SolveEnded):
        raise
    except (Exception, SystemExit) as error:
        advice = f"; lower {arg('batch_size')}" if "memory" in str(error).lower() else ""
        raise EvaluationFailed(
            f"the model or a solver raised {one_line(error)}{advice}; finished batches are kept"
        ) from error
