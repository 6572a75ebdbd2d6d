"""From predictions to numbers: accuracies for each k, over tries, and against several accepted labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from evals.core.accuracy import mean_class, top_accuracies
from evals.core.report import Metric, proportion
from radio.errors import DataError

# Letters: Q queries.

_NUMBER_AT_END = re.compile(r"(\d+)$")


def accuracies(
    rankings: Mapping[int, Tensor], labels: Tensor, num_classes: int, headline: int
) -> dict[str, Metric]:
    """top-1 and top-5 for each k, and the mean over classes for the headline k, in percent.

    top-5 is left out when there are fewer than five classes; a class without a vote is no prediction.
    """
    metrics: dict[str, Metric] = {}
    for k in sorted(rankings, key=lambda k: (k != headline, k)):
        metrics |= top_accuracies(rankings[k], labels, num_classes, "" if k == headline else f"_k{k}")
    metrics["mean_class"] = mean_class(rankings[headline], labels)
    return metrics


def repeated(values: Sequence[float]) -> Metric:
    """The mean of several tries, and their standard deviation (n - 1) where there are two or more."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return Metric(value=float(tensor.mean()), std=float(tensor.std()) if len(values) > 1 else None)


def real_accuracy(ranking: Tensor, keys: Sequence[str], path: Path) -> Metric:
    """top-1 against several accepted labels (L. Beyer et al. 2020); pictures without any do not count.

    Args:
        ranking: [Q, 5] predictions.
        keys: [Q] names. In a list, the number that ends a name (`..._00000001.JPEG`) is the place from 1;
            in an object, the name without folders, with or without its ending, is the key.

    Raises:
        DataError: not such a file, or a picture that it does not know.
    """
    accepted = _read_accepted(path)
    counted = [
        (int(top), _accepted(accepted, key, path)) for top, key in zip(ranking[:, 0], keys, strict=True)
    ]
    judged = [(top, allowed) for top, allowed in counted if allowed]
    if not judged:
        raise DataError(f"{path}: accepts no label for any of the pictures")
    return proportion(sum(top in allowed for top, allowed in judged), len(judged))


def _read_accepted(path: Path) -> list[list[int]] | dict[str, list[int]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file of accepted labels")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    entries = data.values() if isinstance(data, dict) else data if isinstance(data, list) else [None]
    if not all(isinstance(entry, list) and all(isinstance(n, int) for n in entry) for entry in entries):
        raise DataError(f"{path}: wanted a list (or an object) of lists of class numbers")
    found: list[list[int]] | dict[str, list[int]] = data
    return found


def _accepted(accepted: list[list[int]] | dict[str, list[int]], key: str, path: Path) -> list[int]:
    name = PurePosixPath(key)
    if isinstance(accepted, dict):
        for candidate in (key, name.name, name.stem):
            if candidate in accepted:
                return accepted[candidate]
        raise DataError(f"{path}: has no entry for {key}")
    number = _NUMBER_AT_END.search(name.stem)
    place = int(number.group(1)) if number else 0
    if not 1 <= place <= len(accepted):
        raise DataError(
            f"{path}: has {len(accepted)} entries, and {key} does not end in a number from 1 to that"
        )
    return accepted[place - 1]
