"""Where the project lies, what it needs, and the `.venv` that holds it: standard library only."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

from cellop_nb.commands.terminal import Status, clock, complain, say
from cellop_nb.errors import DataError, SetupError
from cellop_nb.files import storing, try_lock
from cellop_nb.notebook import parameters
from cellop_nb.packages import missing, requirements

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
IS_CHECKOUT, NOTEBOOKS = parameters.IS_CHECKOUT, parameters.FOLDER
SHARE = NOTEBOOKS.parent  # of the example screen, too
VENV = ROOT / ".venv"

_STAMP = VENV / "cellop-stamp"
# outside .venv, which a fresh start clears; the set-up that works holds its lock
_UNFINISHED = ROOT / "runs" / ".setup-unfinished"
_LOG = ROOT / "runs" / "setup.log"
_RESTARTED = "CELLOP_RESTARTED"


def home() -> Path:
    """The folder whose `notebooks/` are meant: the checkout, or where an installed package is used."""
    return ROOT if IS_CHECKOUT else Path.cwd()


def notebooks() -> Path:
    """The checkout's notebooks; installed, a person's own copy in the current folder, else the package's."""
    own = home() / "notebooks"
    return own if next(own.glob("[0-9][0-9]_*.ipynb"), None) else NOTEBOOKS


def require_checkout(folder: str) -> None:
    """Refuse a command whose folder a wheel does not carry, outside of a checkout."""
    if not (ROOT / folder).is_dir() or not IS_CHECKOUT:
        fix = "clone the repository and run the command there"
        raise DataError(f"a checkout with a {folder}/ folder", f"none in {ROOT}", fix)


def stamp() -> str:
    """Fingerprint of the files that decide what `.venv` holds."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def ensure(extras: tuple[str, ...], arguments: list[str]) -> None:
    """Return when this interpreter can run the command; otherwise make `.venv` once and start again in it.

    `extras` are those of pyproject.toml that the command needs beside the dependencies, `arguments` its command line.
    """
    if IS_CHECKOUT:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    lacking = missing(requirements(*extras))
    if not lacking:
        return
    if not IS_CHECKOUT:
        named = f"cellop_nb[{','.join(extras)}]" if extras else "cellop_nb"
        problem, fix = f"none of: {', '.join(lacking)}", f'run `pip install "{named}"`'
        raise SetupError("the packages that this command needs", problem, fix)
    if os.environ.get(_RESTARTED):
        problem, fix = f"none of: {', '.join(lacking)}", f"delete {VENV} and run the command again"
        raise SetupError("an environment with every package of pyproject.toml", problem, fix)
    if not is_ready(extras):
        make(extras)
    restart(arguments)


def is_ready(extras: tuple[str, ...]) -> bool:
    """Whether `.venv` was finished with these extras, for the present pyproject.toml and constraints.txt."""
    return {*extras} <= {*_stamped()[1:]} and stamp() in _stamped() and _runs()


def _stamped() -> list[str]:
    """The fingerprint that `.venv` was finished with, and its extras."""
    return _STAMP.read_text(encoding="utf-8").split() if _STAMP.is_file() else []


def venv_python() -> Path:
    """Interpreter of `.venv`."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _runs() -> bool:
    if not venv_python().exists():
        return False
    probe = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([venv_python(), "-c", probe], capture_output=True).returncode == 0


def make(extras: tuple[str, ...]) -> None:
    """Create or complete `.venv` with these extras and those that it had.

    The stamp is written last, so that a broken installation is redone.
    """
    extras = tuple(sorted({*extras, *_stamped()[1:]}))
    with storing(_LOG):
        _LOG.parent.mkdir(exist_ok=True)
    afresh = _UNFINISHED.exists() or not _runs()
    with _UNFINISHED.open("w") as mark:
        if try_lock(mark.fileno()) is False:
            fix = "wait until it has ended, then run the command again"
            raise SetupError(f"one set-up at a time in {VENV}", "another one running", fix)
        _STAMP.unlink(missing_ok=True)
        say(f"Setting up {VENV} (once; about 2 GB, a few minutes). Log: {_LOG}")
        with _LOG.open("w", encoding="utf-8") as log, Status("setting up") as status:
            if afresh:
                status.update("creating the environment")
                _follow([sys.executable, "-m", "venv", "--clear", str(VENV)], log, status)
            status.update("pip: resolving the packages")
            _follow(_pip_command(extras), log, status)
        _STAMP.write_text(" ".join([stamp(), *extras]), encoding="utf-8")
    _UNFINISHED.unlink()
    say(f"Ready after {clock(status.seconds)}.")


def _pip_command(extras: tuple[str, ...]) -> list[str]:
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--prefer-binary"]
    quiet.append("--no-compile")  # most of the 2 GB is never imported; Python compiles what is, when it is
    return [
        str(venv_python()), "-m", "pip", "install", *quiet,
        "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT),
    ]  # fmt: skip


def _follow(command: list[str], log, status: Status) -> None:
    """Run a command, keep what it prints in the log, show its stage, raise when it fails."""
    log.write(f"$ {' '.join(command)}\n")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
    )
    assert process.stdout is not None, "started with a pipe"
    last: deque[str] = deque(maxlen=25)
    for line in process.stdout:
        log.write(line)
        log.flush()
        last.append(line.rstrip())
        status.update(last[-1].strip()[:80])
    if process.wait():
        complain("\n".join(last))
        fix = f"read {_LOG}, repair the cause (network? disk?) and run the command again"
        if "venv" in command and any("ensurepip" in line for line in last):
            fix = (
                "install the venv module (Debian: apt install python3-venv), or use conda and environment.yml"
            )
        step = f"a failing step: {' '.join(command[1:4])}"
        raise SetupError("the set-up to succeed", step, fix)


def restart(arguments: list[str]) -> None:
    """Start the same command line again in `.venv`; does not return."""
    os.environ[_RESTARTED] = "1"
    sys.exit(become([str(venv_python()), "-m", "cellop_nb", *arguments]))


def become(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> int:
    """Go on as another program, which gets every signal itself: none stays behind when this one is ended."""
    surroundings = {**os.environ, **(env or {})}
    if os.name != "nt":  # there it returns to the shell at once
        os.chdir(cwd or ".")
        os.execve(command[0], command, surroundings)
    return subprocess.call(command, cwd=cwd, env=surroundings)
