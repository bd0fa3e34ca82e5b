"""Import times in seconds: ``import fxquant``, its names, and the command line's help.

    python benchmarks/import_time.py --out benchmarks/results/import_time.json

Each figure is the median of several new interpreters, run in turn: noise affects all figures
equally. ``python -c pass`` is the lower limit of every figure.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import machine, write_results
from rich.console import Console
from rich.table import Table

_HELP = "from fxquant.cli import main; main(['--help'])"
CODES = {
    "python -c pass": "pass",
    "import fxquant": "import fxquant",
    "fxquant --help": _HELP,
    "import torch": "import torch",
    "from fxquant import compile": "from fxquant import compile",
}


def measure(rounds: int) -> dict[str, float]:
    """Median seconds of each line of ``CODES``, after a round that fills the disk's cache.

    Args:
        rounds: number of interpreters started for each line.
    """
    seconds: dict[str, list[float]] = {name: [] for name in CODES}
    for turn in range(rounds + 1):
        for name, code in CODES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints a table, and writes its figures to the file of ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="interpreters for each line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args()
    seconds = measure(options.rounds)
    table = Table("code", "seconds", "beyond python -c pass")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value - seconds['python -c pass']:.2f}")
    print(f"{machine()['cpu']}, median of {options.rounds}")
    Console().print(table)
    if options.out is not None:
        rows = [{"code": name, "seconds": value} for name, value in seconds.items()]
        write_results(options.out, "import_time", {"rounds": options.rounds}, rows)


if __name__ == "__main__":
    main()
