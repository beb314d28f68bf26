"""The command `trb`: init, train, eval, compare, sweep, probe, report, doctor.

Arguments in, tables and exit codes out; what the commands do is in the modules they call. Those are imported inside
the commands, so that `trb --help` answers at once. Exit codes: 0 done, 1 a check of `doctor` failed (or a bug), 2 the
request cannot be carried out (the message says why), 130 interrupted, 141 nobody reads the output any more.

Nothing a model wrote is ever printed: a completion can hold terminal escape sequences.
"""

import argparse
import io
import logging
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import trb
from trb.cli.arguments import EXAMPLES, add_command
from trb.cli.display import message
from trb.cli.doctor import add_doctor, run_doctor
from trb.cli.evaluate import add_eval, run_eval
from trb.cli.init import add_init, run_init
from trb.cli.probe import add_probe, run_probe
from trb.cli.report import add_report, run_report
from trb.cli.sweep import add_sweep, run_sweep
from trb.cli.train import add_compare, add_train, run_compare, run_train
from trb.errors import is_for_people
from trb.safety.untrusted import printable

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is not None:
        return _run(argv)
    # This process is the command, and nobody else's.
    _write_any_name()
    _shield_terminal()
    _end_with_launcher()
    try:
        try:
            code = _run(None)
        except SystemExit:
            _flush()
            raise
        _flush()
        return code
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:  # or Python would try once more at its end, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141  # as a shell says of what SIGPIPE ended


def _write_any_name() -> None:
    """Let the name of a file that a terminal of few characters lacks be written by its number, and end no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and not None, or what somebody has put there
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what is still in a buffer, help for instance, while it can be said what becomes of it."""
    if sys.stdout is not None:  # as it is in a process that was started without one
        sys.stdout.flush()


def _is_unread(stream: TextIO | None) -> bool:
    """Whether a stream leads into a pipe that nobody reads any more, as `| head` leaves it."""
    if stream is None:
        return False
    poller = select.poll()
    poller.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    # Threads that spin while they wait slow each other down wherever cores are shared; set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join(rest)}{arguments.no_overrides}")
    try:
        with _interruptible(alone=argv is None):
            return arguments.command(arguments, rest)
    except KeyboardInterrupt:
        _say(f"interrupted. {arguments.hint}")
        return 130
    except Exception as error:
        if arguments.debug or os.environ.get("TRB_DEBUG") == "1" or not is_for_people(error):
            raise
        _say(f"error: {message(error)}")
        return 2


def _shield_terminal() -> None:
    """Let warnings and tracebacks, which quote files and what is in them, write plain text only."""
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: printable(format_warning(*arguments, **options))
    sys.excepthook = lambda *error: _say("".join(traceback.format_exception(*error)).rstrip())
    if logging.lastResort is not None:  # what prints the log of a process that set up none
        logging.lastResort.setFormatter(_PlainText())


def _end_with_launcher() -> None:
    """A launcher that is killed ends none of its processes, which would train on beside the next start."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        from trb.training.ranks import end_with

        end_with(parent)


@contextmanager
def _interruptible(*, alone: bool) -> Iterator[None]:
    """Ctrl-C interrupts what is done inside; from then on, or once it is done, it ends the process as a kill does.

    `alone` says that this process is the command; nothing changes for a process that is more than that, or that was
    started with Ctrl-C switched off.
    """
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: Any) -> None:
        os._exit(130)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end)


class _PlainText(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(f"{record.levelname.lower()}: {super().format(record)}")


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)


# ---- arguments ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trb",
        description="On-policy distillation of language models with trust-region behavior blending.",
        epilog=f"examples:\n{EXAMPLES['']}\n\nTRB_DEBUG=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trb {trb.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    keys: dict[str, Any] = {"overrides": True, "recipes": True}
    add_init(add_command(commands, "init", "write a first recipe for a pair and data", run_init))
    add_train(add_command(commands, "train", "distil a teacher into a student", run_train, **keys))
    add_compare(add_command(commands, "compare", "train several methods from the same student", run_compare, **keys))
    scored = "pass@1 of a model, or its reverse KL to a teacher, with a 95%% interval"
    add_eval(add_command(commands, "eval", scored, run_eval))
    judged = "run a study: methods x settings x seeds, judged by fixed rules"
    add_sweep(add_command(commands, "sweep", judged, run_sweep, recipes=True))
    probed = "what blending does to a student's prefixes, before training"
    add_probe(add_command(commands, "probe", probed, run_probe, recipes=True))
    add_report(add_command(commands, "report", "write the page of a run, a comparison, a study or a probe", run_report))
    add_doctor(add_command(commands, "doctor", "check this machine, and a pair of models", run_doctor, **keys))
    return parser
