"""The command line: dispatch of commands, exit codes, display of errors.

Exit codes: 0 success, 1 ``doctor`` reports a wrong file, 2 an error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from fxquant.cli.arguments import build_parser
from fxquant.errors import FxQuantError
from fxquant.utils.log import show_log

RESUME_HINT = (
    ": the same command continues a search of widths or a training where it stopped, other steps "
    "start again"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None uses the process's arguments.

    Returns:
        The exit code.
    """
    defaults = argparse.Namespace(debug=False, verbose=False, threads=None)
    options = build_parser().parse_args(argv, defaults)
    if options.verbose:
        show_log()
    try:
        return _run(options)
    except FxQuantError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.command == "compile"  # from the losses and blocks in its cache
        print(f"interrupted{RESUME_HINT if resumes else ''}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    """Runs the command; each imports what it needs, so that ``--help`` waits for nothing."""
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    if options.command == "policies":
        from fxquant.cli import policies

        return policies.run_policies(options)
    if options.command == "pareto":
        from fxquant.cli import widths

        return widths.run_pareto(options)
    if options.command == "demo":
        from fxquant.cli import demo

        return demo.run_demo(options)
    from fxquant.cli import commands

    run = {
        "compile": commands.run_compile,
        "eval": commands.run_eval,
        "doctor": commands.run_doctor,
    }
    return run[options.command](options)
