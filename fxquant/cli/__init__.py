"""The command line: what runs, exit codes, and how errors are shown.

Exit codes: 0 success, 1 ``doctor`` found the file wrong, 2 an error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

import torch

from fxquant.cli.arguments import build_parser
from fxquant.errors import FxQuantError

GOES_ON = (
    ": the same command takes up a search of widths or a training where it stopped, other steps "
    "begin anew"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Returns:
        The exit code.
    """
    usual = argparse.Namespace(debug=False, threads=None)
    options = build_parser().parse_args(argv, usual)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return _run(options)
    except FxQuantError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.command == "compile"  # from the losses and blocks in its cache
        print(f"interrupted{GOES_ON if goes_on else ''}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    # timm, torchvision and onnxruntime take seconds to import, which --help need not wait for.
    from fxquant.cli import commands, demo, widths

    runs = {
        "compile": commands.run_compile,
        "eval": commands.run_eval,
        "doctor": commands.run_doctor,
        "policies": commands.run_policies,
        "demo": demo.run_demo,
        "pareto": widths.run_pareto,
    }
    return runs[options.command](options)
