"""A JupyterLab of its own, and a Chromium page on it: what a person sees and presses, for tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat

_HOME = Path(__file__).resolve().parents[2]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
_LAB = [
    "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port=0",
    "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
]  # fmt: skip
# every cell stays in the page, so that a control can be found wherever the page is scrolled
_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}


def chromium() -> str | None:
    """Path of an installed browser."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def launch(playwright, path: str, home: Path):
    """A headless browser whose home folder is `home`: it need not be able to write into the user's."""
    home.mkdir()
    places = {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
    surroundings = {**os.environ, **{name: str(place) for name, place in places.items()}}
    return playwright.chromium.launch(executable_path=path, args=_FLAGS, env=surroundings, timeout=60_000)


class Lab:
    """JupyterLab on a folder of notebooks, with its own configuration, ended with all its kernels.

    Parameters
    ----------
    folder
        Empty folder; notebooks go to `folder/notebooks`.
    theme
        ``"JupyterLab Light"`` or ``"JupyterLab Dark"``.
    """

    def __init__(self, folder: Path, *, theme: str = "JupyterLab Light"):
        self.root = folder / "notebooks"
        self._folder = folder
        self._command = ["jupyterlab", f"--ServerApp.root_dir={self.root}", *_LAB]
        self.root.mkdir(parents=True)
        for name, values in {**_SETTINGS, "apputils-extension/themes": {"theme": theme}}.items():
            self._write_settings(name, values)
        places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
        self._env = {
            **os.environ,
            **{f"JUPYTER_{name}": str(folder / place) for name, place in places.items()},
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTER_PREFER_ENV_PATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_HOME), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }

    def _write_settings(self, name: str, values: dict) -> None:
        path = self._folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    def copy(self, notebook: Path, **parameters) -> str:
        """Copy a committed notebook, its parameters changed as a person would; its name."""
        book = nbformat.read(notebook, 4)
        cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(book, self.root / notebook.name)
        return notebook.name

    def __enter__(self) -> Lab:
        self._log = (self._folder / "lab.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._command],
            cwd=self.root, env=self._env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self._server = wait_for(self._running_server, 90, "JupyterLab to start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _running_server(self) -> dict | None:
        if self._process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended: {(self._folder / 'lab.log').read_text()[-2000:]}")
        for path in (self._folder / "runtime").glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text())
            except ValueError:  # half written
                continue
        return None

    def __exit__(self, *_) -> None:
        """End the server, which shuts its kernels down first; a `family` ends what is left of both."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._log.close()

    def url(self, notebook: str) -> str:
        """Address of a notebook, in a workspace of its own."""
        return f"{self._server['url']}lab/workspaces/{Path(notebook).stem}/tree/{notebook}?token={self._server['token']}"


class ProjectLab(Lab):
    """JupyterLab as our own command opens it, in a copy of the project that nobody has opened before.

    Parameters
    ----------
    folder
        Empty folder; the copy goes to `folder/notebooks`, and is `root`.
    *options
        Words after ``python3 -m cellop_nb lab``.
    """

    def __init__(self, folder: Path, *options: str):
        super().__init__(folder)
        self._command = ["cellop_nb", "lab", *options, "--", *_LAB]
        self._env["PYTHONPATH"] = str(self.root)
        for name in ("cellop_nb", "notebooks", "data"):
            shutil.copytree(_HOME / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(_HOME / name, self.root)

    @property
    def first_page(self) -> str:
        """Address that a person's browser opens."""
        return f"{self._server['url']}?token={self._server['token']}"


def wait_for(condition: Callable, seconds: float, what: str):
    """The first true value of `condition`, asked ten times a second."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)
    return value


class NotebookPage:
    """One notebook in one browser page; its kernel is waited for, unless it is `running` a cell.

    Attributes
    ----------
    problems
        What the browser's console reported as an error, and uncaught exceptions.
    """

    _IDLE = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

    def __init__(self, browser, url: str, *, running: bool = False):
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.problems: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.set_default_timeout(60_000)
        self.page.goto(url, timeout=120_000, wait_until="domcontentloaded")
        if not running:
            self.wait_until_idle(120)

    def __enter__(self) -> NotebookPage:
        return self

    def __exit__(self, *_) -> None:
        """Close the page without asking about what is unsaved; the kernel ends with the server."""
        self.page.close()

    def _hear(self, message) -> None:
        if message.type == "error":
            self.problems.append(f"{message.text} {message.location.get('url', '')}")

    def wait_until_idle(self, seconds: float) -> None:
        """Wait for the kernel, not for its indicator."""
        self.page.wait_for_function(self._IDLE, timeout=seconds * 1000)

    def run_silently(self, expression: str) -> str:
        """What the kernel gives for an expression, as text; no cell is needed."""
        ask = """async code => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const asked = {code: '', silent: true, store_history: false, user_expressions: {said: code}};
            const reply = await kernel.requestExecute(asked).done;
            return reply.content.user_expressions.said.data['text/plain'];
        }"""
        return self.page.evaluate(ask, expression)

    def ipykernel(self) -> tuple[int, ...]:
        """Release of the kernel that answers, as (7, 4)."""
        said = self.run_silently("__import__('ipykernel').__version__")
        return tuple(map(int, said.strip("'").split(".")[:2]))

    def interrupt(self) -> None:
        """Press the stop square."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:interrupt-kernel'); }")

    def run_all(self) -> None:
        """Start all cells, and do not wait for them."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def wait_until_run(self, seconds: float) -> None:
        """Wait until every code cell with text bears a number, and the kernel is idle again."""
        done = """() => [...document.querySelectorAll('.jp-CodeCell')]
            .filter(cell => cell.querySelector('.cm-content')?.textContent.trim())
            .every(cell => /\\d/.test(cell.querySelector('.jp-InputPrompt')?.textContent ?? ''))"""
        self.page.wait_for_function(done, timeout=seconds * 1000)
        self.wait_until_idle(seconds)

    def press(self, button: str) -> None:
        self.page.locator(f'button:has-text("{button}")').first.click()

    def slide(self, name: str, key: str = "ArrowRight", times: int = 1) -> None:
        """Move the slider of that name by keyboard."""
        row = self.page.locator(".widget-hslider", has=self.page.get_by_text(name, exact=True))
        handle = row.locator(".noUi-handle").first
        handle.focus()
        for _ in range(times):
            handle.press(key)

    def choose(self, name: str, option: str) -> None:
        """Choose from the drop-down list of that name."""
        row = self.page.locator(".widget-dropdown", has=self.page.get_by_text(name, exact=True))
        row.locator("select").first.select_option(label=option)

    def write(self, name: str, text: str) -> None:
        """Write into the text box of that name, and leave it."""
        row = self.page.locator(".widget-text, .widget-combobox", has=self.page.get_by_text(name, exact=True))
        row.locator("input").first.fill(text)
        row.locator("input").first.press("Tab")

    def said(self, pattern: str, seconds: float = 60) -> str:
        """Wait for a status line with text of that pattern (a regular expression); the line."""
        wanted = re.compile(pattern)

        def found() -> str | None:
            return next(filter(wanted.search, self.status_lines()), None)

        try:
            return wait_for(found, seconds, f"a line like {pattern!r}")
        except TimeoutError as late:
            late.add_note(f"The lines were {self.status_lines()}; errors: {self.errors_in_cells()}")
            late.add_note(f"The page looked like {self.photograph()}")
            raise

    def status_lines(self) -> list[str]:
        """The text of every status line."""
        find = "() => [...document.querySelectorAll('[role=status]')].map(line => line.textContent)"
        return self.page.evaluate(find)

    def photograph(self) -> Path:
        """What the page looks like just now."""
        path = Path(tempfile.mkdtemp(prefix="page-")) / "page.png"
        path.write_bytes(self.page.screenshot(timeout=20_000))
        return path

    def pictures(self) -> list[str]:
        """The pictures in the outputs, as the page holds them."""
        return self.page.evaluate(
            "() => [...document.querySelectorAll('.jp-OutputArea-output img')].map(i => i.src)"
        )

    def explorer_picture(self) -> str:
        """Address of the explorer's picture, another one for each picture."""
        return self.page.locator("img.widget-image").first.get_attribute("src")

    def run_next(self) -> None:
        """Run the selected cell to its end, and select the next."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')")

    def save(self) -> None:
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")

    def errors_in_cells(self) -> list[str]:
        """Tracebacks and text on stderr in the outputs."""
        kinds = ["error", "stderr"]
        selector = ", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in kinds)
        return self.page.locator(selector).all_inner_texts()
