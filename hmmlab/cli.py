"""The command line: ``hmmlab lab | run | replay | show | bench``.

Exit codes: 0 all is well; 1 a recording differs; 2 a file is malformed, or cannot be read or
written; 3 the model does not have an operation yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hmmlab.session import Session

__all__ = ["main"]

_MALFORMED, _UNSUPPORTED = 2, 3

#: From so many recordings on, a bar shows how far it is.
_MANY = 8

#: The bench measures up to so many pages.
_MOST_PAGES = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["lab"]:  # everything behind it belongs to JupyterLab
        from hmmlab import lab

        return lab.main(args[1:])
    parsed = _parser().parse_args(args)
    try:
        code: int = parsed.command(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has had enough
        sys.stderr.close()
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmmlab", description="Learn how a device shares a process's memory in Linux."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("lab", help="open JupyterLab at the notebooks; takes its arguments")
    run = commands.add_parser("run", help="run a scenario and print the answers as JSON lines")
    run.add_argument("scenario", type=Path, metavar="SCENARIO.txt")
    run.add_argument("--save", type=Path, metavar="FILE", help="save the machine and its trace")
    run.set_defaults(command=_run)
    replay = commands.add_parser("replay", help="hold the model against recordings of a real Linux")
    replay.add_argument("traces", type=Path, nargs="+", metavar="TRACE.jsonl")
    replay.set_defaults(command=_replay)
    show = commands.add_parser("show", help="print the operations of a saved machine")
    show.add_argument("saved", type=Path, metavar="FILE")
    show.set_defaults(command=_show)
    bench = commands.add_parser("bench", help="measure the model against a kernel and a copy")
    bench.add_argument("--json", action="store_true", help="print one JSON object, no table")
    bench.add_argument("--pages", type=_pages, metavar="N", help="measure at this size alone")
    bench.set_defaults(command=_bench)
    return parser


def _complain(message: object) -> None:
    print(message, file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    from hmmlab.model.machine import StuckError
    from hmmlab.scenario import ScenarioError, parse
    from hmmlab.session import Session, UnsupportedError, run

    path: Path = args.scenario
    try:
        operations = parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        _complain(f"{path}:{_line_of(error)}: expected text in UTF-8")
        return _MALFORMED
    except OSError as error:
        _complain(f"{path}: {error.strerror}")
        return _MALFORMED
    except ScenarioError as error:
        _complain(error)
        return _MALFORMED
    session = Session(record=args.save is not None)
    done = 0
    try:
        for answer in run(operations, session):
            print(json.dumps(answer))
            done += 1
    except (UnsupportedError, StuckError) as error:
        sys.stdout.flush()
        _complain(f"{path}:{operations[done].line}: {error}")
        return _UNSUPPORTED
    return _save(session, args.save) if args.save else 0


def _save(session: Session, path: Path) -> int:
    from hmmlab.saving import save

    try:
        save(path, session.machine, session.trace)
    except OSError as error:
        sys.stdout.flush()
        _complain(f"{path}: {error.strerror}")
        return _MALFORMED
    return 0


def _show(args: argparse.Namespace) -> int:
    from hmmlab.saving import SaveError, load

    try:
        machine, trace = load(args.saved)
    except OSError as error:
        _complain(f"{args.saved}: {error.strerror}")
        return _MALFORMED
    except SaveError as error:
        _complain(error)
        return _MALFORMED
    print(f"{args.saved}: {machine.ram_pages} pages of RAM, {trace or 'no trace'}")
    for operation in trace.operations if trace else ():
        print(f"  {operation.actor}: {operation.text} ({operation.last - operation.first} steps)")
    return 0


def _line_of(error: UnicodeDecodeError) -> int:
    return bytes(error.object[: error.start]).count(b"\n") + 1


def _replay(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hmmlab.kernel_traces import RecordingError, judge, read_recording

    worst = 0
    quiet = len(args.traces) < _MANY or not sys.stderr.isatty()
    for path in tqdm(args.traces, unit="recording", disable=quiet, leave=False):
        try:
            verdict = judge(read_recording(path), str(path))
        except OSError as error:
            _complain(f"{path}: {error.strerror}")
            worst = max(worst, _MALFORMED)
            continue
        except RecordingError as error:
            _complain(error)
            worst = max(worst, _MALFORMED)
            continue
        tqdm.write(f"{path.name}: {verdict.text}")
        if verdict.detail:
            tqdm.write("  " + verdict.detail.replace("\n", "\n  "))
        worst = max(worst, 0 if verdict.kind == "same" else 1)
    return worst


def _pages(word: str) -> int:
    pages = int(word)
    if not 1 <= pages <= _MOST_PAGES:
        raise argparse.ArgumentTypeError(f"{pages}: expected 1 to {_MOST_PAGES}")
    return pages


def _bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hmmlab.bench import SIZES, bench, table

    with tqdm(bar_format="{desc}", disable=not sys.stderr.isatty(), leave=False) as bar:
        report = bench([args.pages] if args.pages else SIZES, bar.set_description_str)
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
