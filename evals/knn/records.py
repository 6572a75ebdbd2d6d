"""One JSON line per query: its label, its predictions, and the neighbours that voted."""

from __future__ import annotations

import json
from collections.abc import Iterator

from torch import Tensor

from evals.core.features import Bank

from .classify import Sets
from .index import Neighbours


def records_of(sets: Sets, queries: Bank, labels: Tensor, neighbours: Neighbours, ranking: Tensor) -> str:
    """Format the records of all queries, one line each.

    Args:
        labels: [Q], indices into the bank's classes.
        neighbours: [Q, k], the nearest first; their ids are indices into the bank.
        ranking: [Q, 5], the classes with most votes.
    """
    return "".join(_lines(sets, queries, labels, neighbours, ranking))


def _lines(
    sets: Sets, queries: Bank, labels: Tensor, neighbours: Neighbours, ranking: Tensor
) -> Iterator[str]:
    classes, bank_keys, query_keys = sets.bank.classes, sets.bank.keys, sets.asked.keys
    for row, place in enumerate(queries.indices.tolist()):
        ids = [number for number in neighbours.ids[row].tolist() if number >= 0]
        record = {
            "key": query_keys[place],
            "label": classes[int(labels[row])],
            "predictions": [classes[label] for label in ranking[row].tolist() if label >= 0],
            "neighbour_ids": ids,
            "neighbours": [bank_keys[number] for number in ids],
            "similarities": [round(s, 6) for s in neighbours.similarities[row, : len(ids)].tolist()],
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"
