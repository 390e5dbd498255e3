"""The app that commands register with, what they have in common, and how a command line ends."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from toolkit import __version__, progress
from toolkit.errors import ToolkitError

DONE, DEFECT, BAD_INPUT, GATE_UNMET, INTERRUPTED = 0, 1, 2, 3, 130
UNREAD = 1
"""As typer ends where nobody reads what is printed."""

app = typer.Typer(
    help="Prune, fine-tune adversarially, quantise to integer ONNX, and prove what ships.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Settings = dict[str, Any]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with an estimate; write nothing.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="A config.yaml; flags win over it.")]
Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that harden wrote.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint, state dict, or shipped:cnn8.")]
ModelIfNamed = Annotated[str | None, typer.Argument(metavar="MODEL|CONFIG.yaml", help="Checkpoint, or shipped:cnn8.")]


@dataclass
class _Invocation:
    """The command line that is running."""

    arguments: tuple[str, ...] = ()
    verbose: bool = False
    on_interrupt: Callable[[], str] | None = None


_running = _Invocation()


def start(quiet: bool, verbose: bool) -> None:
    """What every command does first."""
    _running.verbose = verbose
    progress.set_quiet(quiet)


def say_on_interrupt(hint: Callable[[], str]) -> None:
    """What to say if this command is interrupted from here on."""
    _running.on_interrupt = hint


def resume_hint(resumable: Callable[[], bool], output: str) -> None:
    """What to say if this command is interrupted, which writes `output` at its end."""
    nothing = f"nothing was written to {output}"
    again = f"{nothing}; start again with the same command"
    say_on_interrupt(lambda: continue_with(nothing) if resumable() else again)


def continue_with(state: str) -> str:
    """What is kept, and the command that goes on from it."""
    return f"{state}; continue with: {_command(without='--resume')} --resume"


def go_on_with(state: str) -> str:
    """What is kept, and this command without --force, which goes on from it."""
    return f"{state}; continue with: {_command(without='--force')}"


def _command(without: str) -> str:
    return f"toolkit {shlex.join([argument for argument in _running.arguments if argument != without])}"


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    global _running
    _running = _Invocation(tuple(arguments))
    try:
        with _heeding_termination():
            outcome = app(args=list(arguments), prog_name="toolkit", standalone_mode=False)
            print(end="", flush=True)  # or what is still unprinted fails where nobody can tell
    except ToolkitError as error:
        show_error(error)
        return BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except TyperException as error:
        show = getattr(error, "show", None)  # usage errors show themselves
        if show is not None:
            show()
        else:
            print(error, file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        if _is_of_standard_output(error):
            return _unprinted(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = str(error.filename or "")
            show_error(ToolkitError("a file's name is too long", found=f"{name[:60]}...", fix="choose a shorter one"))
            return BAD_INPUT
        if _running.verbose:  # anything else is a defect of ours, and says so
            traceback.print_exc()
        print(f"toolkit: a defect of the toolkit: {type(error).__name__}: {error}", file=sys.stderr)
        print("         run the command again with --verbose and report what it prints", file=sys.stderr)
        return DEFECT
    if outcome == INTERRUPTED:  # typer turns Ctrl-C into this code
        return _interrupted()
    return outcome if isinstance(outcome, int) else DONE


def _is_of_standard_output(error: Exception) -> bool:
    """Whether an error came of printing: then an empty line cannot be printed either."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _unprinted(error: Exception) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the end of the process flushes once more
    if isinstance(error, BrokenPipeError):  # a reader that has seen enough, as of `| head`
        return UNREAD
    show_error(
        ToolkitError(
            "standard output takes nothing more",
            found=str(error),
            fix="send it where there is room; files that the command wrote are whole",
        )
    )
    return BAD_INPUT


@contextlib.contextmanager
def _heeding_termination() -> Iterator[None]:
    """Let SIGTERM (`kill`, a container or a batch system that stops) end a command as Ctrl-C does.

    Processes of one training are left to torchrun, which ends them itself.
    """

    def ended(_number: int, _frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGINT)):  # a training that saves itself first
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread() and "TORCHELASTIC_RUN_ID" not in os.environ
    if not ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted() -> int:
    hint = _running.on_interrupt() if _running.on_interrupt else "nothing was written"
    print(f"\ninterrupted: {hint}", file=sys.stderr)
    return INTERRUPTED


def show_error(error: ToolkitError) -> None:
    """The problem, what was found and the fix, on stderr."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    if _running.verbose:
        traceback.print_exc()
    body = Text.assemble((error.problem, "bold"), "\n\nfound: ", error.found, "\nfix:   ", error.fix)
    for note in getattr(error, "__notes__", ()):
        body.append(f"\nnote:  {note}")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    console.print(Panel(body, title="error", title_align="left", border_style="red"))


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
