"""The tables of `bench/solvers.py`, as markdown for the documentation."""

from __future__ import annotations

from typing import Any

from solver_peers import AUTO_ATTACK

Row = dict[str, Any]

OURS, UNION = "`worst_case`", "AutoAttack, then 5 APGD of 100"
TITLES = {
    "fixed": "Robust accuracy at a fixed radius",
    "minimum": "Minimum norm",
    "curve": "The curve of an evaluation at fifty radii",
    "scale": "Robust accuracy by `worst_case` with the logits multiplied",
    "pgd": "Plain PGD, `gradient_ascent` and a loop written by hand",
}


def as_markdown(results: dict[str, Any]) -> str:
    """The tables for the documentation: one for each case, with a column for each set, and the passes beside."""
    lines = [f"{results['setting']}.", ""]
    for table, rows in results["tables"].items():
        lines += [f"**{TITLES[table]}**", ""]
        if table == "fixed":
            lines += _beside_auto_attack(rows)
        if rows and "solver" in rows[0]:
            value = "robust accuracy" if table == "fixed" else "optimality"
            for case in dict.fromkeys(row["case"] for row in rows):
                part = [row for row in rows if row["case"] == case]
                sets = list(dict.fromkeys(row["set"] for row in part))
                lines += _grid([f"{case}: {value} (forward + backward passes)", *sets])
                for solver in dict.fromkeys(row["solver"] for row in part):
                    cells = {
                        row["set"]: f"{_cell(value, row[value])} ({row['forward']:.0f} + {row['backward']:.0f})"
                        for row in part
                        if row["solver"] == solver
                    }
                    lines.append("| " + " | ".join([solver, *(cells.get(name, "") for name in sets)]) + " |")
                lines.append("")
        elif rows:
            lines += _grid(list(rows[0]))
            lines += ["| " + " | ".join(_cell(name, value) for name, value in row.items()) + " |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def _beside_auto_attack(rows: list[Row]) -> list[str]:
    """A row for each case and set: `worst_case`, AutoAttack, both with what they cost."""
    lines = []
    for place in dict.fromkeys((row["case"], row["set"]) for row in rows):
        by = {row["solver"]: row for row in rows if (row["case"], row["set"]) == place}
        if AUTO_ATTACK not in by:
            continue
        cells = [", ".join(place)]
        ours, passes = by[OURS], {name: row["forward"] + row["backward"] for name, row in by.items()}
        for name in (OURS, AUTO_ATTACK, UNION):
            cells += [_cell(name, by[name]["robust accuracy"]), f"{passes[name]:.0f}"]
            if name != OURS:
                cells += [f"1/{passes[name] / max(1.0, passes[OURS]):.1f}"]
                cells += [f"1/{by[name]['seconds'] / ours['seconds']:.1f}"] if name != UNION else []
        lines.append("| " + " | ".join(cells) + " |")
    theirs = ["AutoAttack", "its passes", "passes of `worst_case`, a share of its", "time, a share of its"]
    both = ["AutoAttack and 5 APGD", "their passes", "passes of `worst_case`, a share of theirs"]
    return [*_grid(["network, set", OURS, "passes", *theirs, *both]), *lines, ""] if lines else []


def _grid(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if name == "optimality" else f"{value:.3f}"
