"""The command line: one verb for each arrow, no logic. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sp2dpo import __version__
from sp2dpo.cli import ask, make  # noqa: F401  they add their commands to the app, in this order

# isort: split
from sp2dpo.cli import audit, compare, distill, methods, publish  # noqa: F401
from sp2dpo.cli.terminal import ARGUMENTS, app, say
from sp2dpo.errors import InputError, Sp2dpoError, Unfinished

__all__ = ["app", "main"]

INTERRUPTED = 130

_GO_ON = ("annotate", "cost", "import", "prepare", "run", "train")
_ON = "what is done is kept, and the same command goes on with the rest"

_WRONG_PATH = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
"""What is wrong with a path that was given, rather than with the program."""


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the project's own errors are one line, a bug keeps its traceback."""
    ARGUMENTS[:] = sys.argv[1:] if argv is None else argv
    try:
        app(argv, standalone_mode=True)
    except Sp2dpoError as error:
        say(f"sp2dpo: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            say(f"sp2dpo: {error.filename or 'a file'} could not be written: {error.strerror}; what is done is kept")
            sys.exit(Unfinished.exit_code)
        if error.errno not in _WRONG_PATH or error.filename is None:
            raise
        path = str(error.filename2 or error.filename).removesuffix(".partial")
        say(f"sp2dpo: {path}: {error.strerror}; choose another path")
        sys.exit(InputError.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            kept = ARGUMENTS[:1] and ARGUMENTS[0] in _GO_ON
            say(f"sp2dpo: interrupted; {_ON if kept else 'the same command begins anew'}")
        raise
