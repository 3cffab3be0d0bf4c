"""What the checks of an evaluation measure on the zoo of the tests, model by model: the distribution that the
thresholds of docs/explanation/trust.md rest on.

    python bench/trust.py --out trust.jsonl           # every model, a line of JSON each; what is there is kept
    python bench/trust.py --out trust.jsonl --table   # the tables of what is there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "robustness"))
import zoo  # pyright: ignore[reportMissingImports]
from counting import Counted, Stages, share_of_checks  # pyright: ignore[reportMissingImports]
from zoo_others import HONEST, MISLED  # pyright: ignore[reportMissingImports]

from rai_toolbox.robustness import evaluate


def measured(name: str, case: Any, count: int, restarts: int | None) -> dict[str, Any]:
    model = case.build()
    counted = Counted(model)
    if isinstance(model, torch.nn.Module):
        counted.to(next(model.parameters()).dtype)
    options = {"norms": case.norm, "epsilons": zoo.GRIDS[case.norm], "restarts": restarts, **case.options}
    begun = time.perf_counter()
    result = evaluate(counted, zoo.data_of(case, count), progress=Stages(counted), **options)
    counted.at("after")
    points = result.curves[case.norm].points[1:]
    line: dict[str, Any] = {
        "name": name,
        "kind": "misled" if name in MISLED else "honest",
        "norm": case.norm,
        "samples": count,
        "seconds": round(time.perf_counter() - begun, 1),
        "epsilons": [point.epsilon for point in points],
        "found": [point.value for point in points],
        "by_solvers": [point.value + point.also_by_stronger_attacks / count for point in points],
        "findings": {finding.check: finding.verdict for finding in result.findings},
        "summaries": {finding.check: finding.summary for finding in result.findings if finding.verdict != "ok"},
        "evidence": {finding.check: dict(finding.evidence) for finding in result.findings},
        "rows": dict(counted.rows),
        "calls": dict(counted.calls),
        "times": {stage: round(spent, 2) for stage, spent in counted.times.items()},
    }
    if case.others():
        line["truth"] = zoo.true_accuracies(case, count, line["epsilons"])
    return line


def off(line: dict[str, Any], which: str) -> float | None:
    """By how much the accuracy that was found exceeds the truth, at the worst epsilon."""
    if "truth" not in line:
        return None
    return max(value - true for value, true in zip(line[which], line["truth"], strict=True))


def evidence(line: dict[str, Any], check: str, word: str) -> Any:
    """The largest number whose name holds a word among what a check saw."""
    values = [
        value
        for name, value in line["evidence"].get(check, {}).items()
        if word in name and isinstance(value, (int, float))
    ]
    return max(values, default=None)


COLUMNS = {
    "solvers off": lambda line: off(line, "by_solvers"),
    "off": lambda line: off(line, "found"),
    "lowered": lambda line: max(a - b for a, b in zip(line["by_solvers"], line["found"], strict=True)),
    "corr": lambda line: evidence(line, "gradient-agreement", "correlation_within_0.3"),
    "slope": lambda line: evidence(line, "gradient-agreement", "slope_within_0.3"),
    "jump": lambda line: evidence(line, "boundary-jump", "jump"),
    "rise": lambda line: evidence(line, "boundary-jump", "rise"),
    "left": lambda line: evidence(line, "boundary-jump", "left"),
    "blind": lambda line: evidence(line, "gradient-masking", "broken_by"),
    "diff": lambda line: evidence(line, "finite-differences", "broken"),
    "bpda": lambda line: evidence(line, "bpda", "broken"),
    "twin": lambda line: evidence(line, "transfer", "broken"),
    "rows": lambda line: share_of_checks(line["rows"]),
    "time": lambda line: share_of_checks(line["times"]),
}


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def table(lines: list[dict[str, Any]]) -> None:
    for kind in ("misled", "honest"):
        chosen = [line for line in lines if line["kind"] == kind]
        if not chosen:
            continue
        print(f"\n| {kind} | {' | '.join(COLUMNS)} | do not trust | warning |\n| {'--- | ' * (len(COLUMNS) + 3)}")
        for line in chosen:
            raised = [
                ", ".join(check for check, verdict in line["findings"].items() if verdict == which)
                for which in ("distrust", "warning")
            ]
            cells = [shown(column(line)) for column in COLUMNS.values()]
            print(f"| {' | '.join([line['name'], *cells, *raised])} |")
        print()
        for which in ("distrust", "warning"):
            count = Counter(check for line in chosen for check, verdict in line["findings"].items() if verdict == which)
            print(f"{which}, of {len(chosen)}: {dict(count)}")
        trusted = [line for line in chosen if "distrust" not in line["findings"].values()]
        gaps = [(line["name"], off(line, "found"), off(line, "by_solvers")) for line in chosen if "truth" in line]
        print(f"no check says do not trust: {len(trusted)} of {len(chosen)}")
        if gaps:
            missed = [line["name"] for line in trusted if (off(line, "found") or 0.0) > 0.05]
            fooled = [(name, gap) for name, gap, before in gaps if before is not None and before > 0.05]
            near = sum(gap is not None and gap <= 0.05 for _, gap in fooled)
            print(f"trusted and off by more than 0.05: {missed}")
            print(f"the solvers were off by more than 0.05 in {len(fooled)}; now within 0.05: {near}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=4, help="0 for the default of the evaluation")
    parser.add_argument("--only", default="", help="names that hold this")
    parser.add_argument("--part", default="1/1", help="2/3: the second third of them")
    parser.add_argument("--kind", choices=("misled", "honest"), help="of these alone")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    there = {}
    if args.out.exists():
        there = {line["name"]: line for line in map(json.loads, args.out.read_text("utf-8").splitlines())}
    if args.table:
        table(list(there.values()))
        return
    which, parts = map(int, args.part.split("/"))
    for kind, cases in {"honest": HONEST, "misled": MISLED}.items():
        for number, (name, case) in enumerate(cases.items()):
            chosen = args.only in name and args.kind in (None, kind) and number % parts == which - 1
            if name in there or not chosen:
                continue
            line = measured(name, case, args.samples, args.restarts or None)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(name, line["seconds"], line["found"], line.get("truth"), flush=True)


if __name__ == "__main__":
    main()
