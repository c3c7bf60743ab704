"""Find Chromium for the browser tests; as a script, see to it that there is one."""

import os
import platform
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-dejavu-core")  # a bare Debian has no font at all
ADVICE = (
    "The browser tests need Chromium: install it (Debian: sudo apt-get install chromium), "
    "or say where it is with HMMLAB_CHROMIUM=/path/to/chromium"
)


def find() -> str | None:
    """Return the path of a Chromium or a Chrome, None where there is none."""
    names = (os.environ.get("HMMLAB_CHROMIUM", ""), *NAMES)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def ensure() -> str | None:
    """Return what to do, in one line, if Chromium is missing and cannot be installed from here."""
    if find():
        return None
    if not may_install():
        return ADVICE
    print("Installing Chromium with apt-get: once, about a minute ...", flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        command = ["apt-get", "-qq", *step]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return f"{' '.join(command)} failed. {ADVICE}"
    return None if find() else ADVICE


def may_install() -> bool:
    """Say whether this is root on Debian."""
    try:
        system = platform.freedesktop_os_release()["ID"]
    except OSError:
        return False
    return system == "debian" and os.geteuid() == 0


if __name__ == "__main__":
    sys.exit(ensure())
