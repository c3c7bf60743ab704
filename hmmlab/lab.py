"""``hmmlab lab``: JupyterLab on this computer alone, opened at the course's index."""

from __future__ import annotations

import argparse
import errno
import os
import re
import socket
import sys
from pathlib import Path

from jupyter_core.paths import jupyter_data_dir

__all__ = ["main"]

HOST = "127.0.0.1"


def main(args: list[str]) -> int:
    """Become a JupyterLab server; return only when it cannot start.

    Parameters
    ----------
    args : list of str
        ``--port`` and ``--notebook-dir`` are read here; all else goes to ``jupyter lab`` as it is.

    Returns
    -------
    int
        1, after one line on stderr that says what is in the way.
    """
    parser = argparse.ArgumentParser(
        prog="hmmlab lab",
        description=f"Open the notebooks in JupyterLab, on {HOST} alone.",
        epilog="Every other argument goes to jupyter lab, such as --no-browser.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, help="this port and no other (default: 8888 or next)")
    parser.add_argument("--notebook-dir", type=Path, help="the folder to open")
    ours, theirs = parser.parse_known_args(args)
    try:
        notebooks = _notebooks(ours.notebook_dir)
        _refuse_other_addresses(theirs)
        if ours.port is not None:
            _check_free(ours.port)
    except _CannotStartError as why:
        print(f"hmmlab lab: {why}", file=sys.stderr)
        return 1

    command = [sys.executable, "-m", "jupyterlab", *_settings(notebooks), *theirs]
    if ours.port is not None:
        command += [f"--ServerApp.port={ours.port}", "--ServerApp.port_retries=0"]
    os.execve(sys.executable, command, _environment())


class _CannotStartError(Exception):
    """What is in the way, in one line."""


def _settings(notebooks: list[Path]) -> list[str]:
    """Say how our lab differs from a plain one, without writing to anyone's settings."""
    return [
        f"--ServerApp.ip={HOST}",
        f"--ServerApp.root_dir={notebooks[0].parent}",
        f"--LabApp.default_url=/lab/tree/{_opening(notebooks).name}",
        # Layouts saved in another lab name files that are not here.
        f"--LabApp.workspaces_dir={Path(jupyter_data_dir()) / 'hmmlab' / 'workspaces'}",
        # Nothing asks the network: no catalogue of extensions, no npm to find language servers.
        "--LabApp.extension_manager=readonly",
        "--LanguageServerManager.autodetect=False",
        # Ctrl-C stops; root in a container is welcome; of the log, only the address and troubles.
        "--ServerApp.answer_yes=True",
        "--ServerApp.allow_root=True",
        "--Application.log_level=WARN",
        "--LabApp.log_level=WARN",
    ]


def _environment() -> dict[str, str]:
    """Add our labconfig (no news, nor the question about them) and prefer our own kernel."""
    package = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [package, os.environ.get("JUPYTER_CONFIG_PATH")]))
    # Of two kernelspecs named python3, take this environment's, not the one in the user's home.
    return {**os.environ, "JUPYTER_CONFIG_PATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}


def _notebooks(folder: Path | None) -> list[Path]:
    """Find the notebooks, sorted: in `folder`, else beside the package, else beside the user."""
    home = Path(__file__).parents[1] / "notebooks"
    places = [folder] if folder else [home, Path("notebooks")]
    for place in places:
        if found := sorted(place.resolve().glob("*.ipynb")):
            return found
    looked = " or ".join(str(place) for place in places)
    raise _CannotStartError(f"no notebook in {looked}; name their folder with --notebook-dir=PATH")


def _opening(notebooks: list[Path]) -> Path:
    """The notebook to open: the index, as of any folder that is served, else the first."""
    return next((path for path in notebooks if path.stem == "index"), notebooks[0])


def _refuse_other_addresses(args: list[str]) -> None:
    for arg in args:
        if re.match(r"--([A-Za-z.]+\.)?ip(=|$)", arg):
            raise _CannotStartError(f"it serves {HOST} alone; without {arg} it will start")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            busy = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "is in use" if busy else f"cannot be had ({error})"
            raise _CannotStartError(
                f"port {port} {why}; name another with --port, or none for the next free one"
            ) from None
