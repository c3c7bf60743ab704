"""The command line: ``hmmlab lab | run | replay``.

Exit codes: 0 all is well; 1 a recording differs; 2 the input is malformed; 3 the model does not
have an operation yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_MALFORMED, _UNSUPPORTED = 2, 3

#: From so many recordings on, a bar shows how far it is.
_MANY = 8


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
    run.set_defaults(command=_run)
    replay = commands.add_parser("replay", help="hold the model against recordings of a real Linux")
    replay.add_argument("traces", type=Path, nargs="+", metavar="TRACE.jsonl")
    replay.set_defaults(command=_replay)
    return parser


def _complain(message: object) -> None:
    print(message, file=sys.stderr)


def _run(args: argparse.Namespace) -> int:
    from hmmlab.scenario import ScenarioError, parse
    from hmmlab.session import UnsupportedError, run

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
    done = 0
    try:
        for answer in run(operations):
            print(json.dumps(answer))
            done += 1
    except UnsupportedError as error:
        sys.stdout.flush()
        _complain(f"{path}:{operations[done].line}: {error}")
        return _UNSUPPORTED
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


if __name__ == "__main__":
    sys.exit(main())
