"""Training curves from a run's `metrics.jsonl`: each loss of each teacher over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radio.config import load_yaml
from radio.errors import ConfigError, DataError
from radio.io import MAX_DATA_BYTES, decode_text, parse_json, read_bytes

from .elements import Plots, Section, notes
from .figures import NUM_SLOTS, Series, lines

_TITLES = {
    "loss": "loss, all teachers",
    "summary": "summary loss",
    "spatial": "spatial loss",
    "centred_cosine": "centred cosine of the tokens",
    "unexplained": "unexplained share of the tokens' variance",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images/s",
    "data_wait": "share of the time spent waiting for data",
}
_MOST = 1e100  # larger numbers are not drawn
_MOST_PANELS = 12
_NOT_DRAWN = frozenset({"step", "samples", "seconds", "broken"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """All curves of a run."""

    panels: dict[str, list[Series]]  # by the quantity: a line for each teacher, or one for the whole run
    last_step: int
    teachers: tuple[str, ...]
    notes: tuple[str, ...] = ()


def curves_section(run: Path) -> Section:
    """Build the section of a run's training curves.

    Raises:
        DataError: as `read_curves`.
    """
    curves = read_curves(run)
    panels = tuple(
        (_TITLES.get(part, part.replace("_", " ")), lines(series, name=f"run-{place}", x_label="step"))
        for place, (part, series) in enumerate(list(curves.panels.items())[:_MOST_PANELS])
    )
    legend = tuple((name, color) for color, name in enumerate(curves.teachers))
    caption = "Means between two log steps. A dashed line is measured, and weighs nothing in the loss."
    plots = Plots(caption=caption, panels=panels, legend=legend)
    title = f"training: {run.resolve().name}, {curves.last_step} steps"
    return Section(anchor="training", title=title, elements=(*notes(curves.notes), plots))


def read_curves(run: Path) -> Curves:
    """Read the curves of a run folder.

    A line that cannot be read (of a run that was killed while it wrote) is left out and noted.

    Raises:
        DataError: no such folder, no `metrics.jsonl` in it, or none of its lines is a record.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        what = "holds no metrics.jsonl" if run.is_dir() else "no such run folder"
        raise DataError(f"{run}: {what}; name the folder that radio-train wrote, such as runs/demo")
    records, broken = _read(path)
    if not records:
        raise DataError(f"{path}: none of its {broken} lines is a record with a step; train again")
    names = [
        name for name in dict.fromkeys(n for record in records for n in record) if name not in _NOT_DRAWN
    ]
    teachers = tuple(
        dict.fromkeys(name.rpartition("/")[0] for name in names if name.endswith(("/summary", "/spatial")))
    )
    unused = _without_weight(run / "config.yaml")
    panels: dict[str, list[Series]] = {}
    for name in names:
        teacher, _, part = name.rpartition("/")
        label, color = teacher or part, NUM_SLOTS - 1  # grey: a quantity of the whole run
        if teacher in teachers:
            color = teachers.index(teacher)
        elif teacher:  # a panel of the whole run with several lines: time/data, time/backward, ...
            part, label = teacher, part
            color = len(panels.get(part, ()))
        if (teacher, part) in unused:
            label += " (weight 0)"
        points = [(record["step"], record[name]) for record in records if name in record]
        series = Series(
            name=label,
            color=color,
            x=tuple(x for x, _ in points),
            y=tuple(y for _, y in points),
            dashed=(teacher, part) in unused,
        )
        panels.setdefault(part, []).append(series)
    order = [*_TITLES, *panels]
    return Curves(
        panels={part: panels[part] for part in sorted(panels, key=order.index)},
        last_step=int(records[-1]["step"]),
        teachers=teachers,
        notes=(f"{broken} lines of metrics.jsonl could not be read and are left out",) if broken else (),
    )


def _read(path: Path) -> tuple[list[dict[str, float]], int]:
    """Read the records, finite numbers only; return them with the number of lines that are no records."""
    records, broken = [], 0
    for line in read_bytes(path, limit=MAX_DATA_BYTES).splitlines():  # of bytes: at line feeds alone
        try:
            record = parse_json(decode_text(line, path), path, constants=True)
        except DataError:
            record = None
        numbers = _numbers(record) if isinstance(record, dict) else {}
        if "step" in numbers:
            records.append(numbers)
        else:
            broken += 1
    return records, broken


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST
    }


def _without_weight(path: Path) -> frozenset[tuple[str, str]]:
    """Return the (teacher, part) pairs that are measured but have weight 0 in the run's settings."""
    try:
        teachers = load_yaml(path)["teachers"]
        return frozenset(
            (teacher["name"], part)
            for teacher in teachers
            for part in ("summary", "spatial")
            if teacher[f"{part}_weight"] == 0
        )
    except (ConfigError, LookupError, TypeError):
        return frozenset()
