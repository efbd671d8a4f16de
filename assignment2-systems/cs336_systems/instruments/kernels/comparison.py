"""A table of one operation by several implementations, over several shapes: what the kernel benchmarks share."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, or_out_of_memory, print_table, write_result
from cs336_systems.instruments.options.common import Measurement


def compare(
    options: Measurement,
    what: str,
    cases: list[Row],
    candidates: Callable[[], Mapping[str, Any]],
    measure: Callable[[Any, Row, torch.device], Row],
) -> None:
    """Measure every candidate in every case, print a table and write a file.

    Args:
        options: of the benchmark.
        what: what is compared.
        cases: the beginnings of the rows.
        candidates: makes the implementations by name, afresh for each case, since compiled ones keep their shapes.
        measure: makes the rest of a row from an implementation, a case and the device.
    """
    device = resolve_device(options.device)
    rows: list[Row] = []
    for case in cases:
        torch.compiler.reset()
        for who, candidate in candidates().items():
            rows.append(case | {"who": who} | or_out_of_memory(partial(measure, candidate, case, device)))
    print_table(what, rows)
    write_result(options, what, rows, device)


def eager_and_compiled(**functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return each function as it is, and under torch.compile; underscores in their names become spaces."""
    candidates: dict[str, Callable[..., Any]] = {}
    for key, function in functions.items():
        name = key.replace("_", " ")
        candidates |= {name: function, f"{name}, compiled": torch.compile(function, fullgraph=True, dynamic=False)}
    return candidates
