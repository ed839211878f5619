"""Files are written whole: no collision, no link followed, modes kept, nothing left; a full disk is said as such."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.figure import Figure

import cellop_nb as co
from cellop_nb.analysis.predict import write_parts
from cellop_nb.errors import DataError, StorageError
from cellop_nb.files import sweep, write_whole
from cellop_nb.notebook import runs, style
from cellop_nb.training.checkpoint import write_models

pytestmark = pytest.mark.skipif(os.name == "nt", reason="modes, links and signals of POSIX")


def text(content: str):
    return lambda part: part.write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- writers that meet


def test_threads_and_processes_that_write_one_file_never_mix(tmp_path):
    """Each content is one letter: a mixture, a lost part or a half file would show."""
    target, letters = tmp_path / "a.txt", "abcdefgh"
    script = (
        "import sys; from pathlib import Path; from cellop_nb.files import write_whole\n"
        "for k in range(20): write_whole(sys.argv[1], lambda part: part.write_text('z' * 100_000))"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(target)])

    def write(letter):
        for _ in range(20):
            write_whole(target, text(letter * 100_000))
            seen = target.read_text()
            assert len(seen) == 100_000 and len({*seen}) == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, letters))
    assert other.wait() == 0
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_still_works_is_not_swept_by_another(tmp_path):
    def slow(part):
        write_whole(tmp_path / "b.txt", text("b"))
        sweep(tmp_path)
        part.write_text("a")

    write_whole(tmp_path / "a.txt", slow)
    assert names(tmp_path) == ["a.txt", "b.txt"]


KILLED = """
import os, signal, sys
from cellop_nb.files import write_whole
def write(part):
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(sys.argv[1], write)
"""


def test_what_kill_9_leaves_goes_with_the_next_write(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target)])
    assert ended.returncode == -signal.SIGKILL
    assert target.read_text() == "before"
    assert len(names(tmp_path)) == 2, "the killed writer left nothing: the test proves nothing"
    write_whole(tmp_path / "b.txt", text("b"))
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_leftovers_of_other_machines_and_without_locks_go_by_age(tmp_path):
    """A lock need not reach from machine to machine: only a day of silence tells."""
    old, young, unlocked = (tmp_path / f".cellop-{name}" for name in ("far-old", "far-young", "x"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "lock").touch()
    unlocked.mkdir()
    mine = tmp_path / ".cellop-notes.txt"
    mine.write_text("a file of the user's own")
    past = time.time() - 100_000
    os.utime(old, (past, past))
    sweep(tmp_path)
    assert names(tmp_path) == [".cellop-far-young", ".cellop-notes.txt", ".cellop-x"]


# -- links and modes


def test_planted_links_are_never_followed(tmp_path):
    """At the target, and wherever a writer's own path may lie: names are random, in a folder of its own."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "a.txt").symlink_to(victim)
    (folder / f".{os.getpid()}.a.txt").symlink_to(victim)
    seen = []

    def write(part):
        seen.append(part)
        assert mode(part.parent.parent) == 0o700, "another user could plant a link here"
        part.write_text("new")

    write_whole(folder / "a.txt", write)
    write_whole(folder / "b.txt", write)
    assert victim.read_text() == "mine"
    assert not (folder / "a.txt").is_symlink()
    assert seen[0].parent != seen[1].parent and str(os.getpid()) not in str(seen[0].relative_to(folder))


def test_a_planted_link_of_a_leftovers_name_leads_nowhere(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "lock").touch()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ".cellop-x").symlink_to(tmp_path / "precious")
    os.utime(tmp_path / "precious", (0, 0))
    sweep(tmp_path / "shared")
    assert names(tmp_path / "precious") == ["lock"]


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664])
def test_the_mode_of_an_earlier_file_is_kept(tmp_path, before):
    target = tmp_path / "a.txt"
    target.touch()
    target.chmod(before)
    write_whole(target, text("new"))
    assert mode(target) == before


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_new_files_and_folders_follow_the_umask(tmp_path, mask):
    def private(part):
        part.touch(mode=0o600)  # as some libraries do

    def folder(part):
        part.mkdir()
        (part / "chunk").write_text("x")

    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a.txt", private)
        write_whole(tmp_path / "a.zarr", folder)
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.txt") == 0o666 & ~mask
    assert (mode(tmp_path / "a.zarr"), mode(tmp_path / "a.zarr" / "chunk")) == (0o777 & ~mask, 0o666 & ~mask)


# -- on the disk


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    """As a power cut would have it: the order of the system's calls."""
    order, fsync, replace = [], os.fsync, os.replace

    def flushed(handle):
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old, new):
        order.append("rename")
        replace(old, new)

    def folder(part):
        part.mkdir()
        (part / "chunk").write_text("x")

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "a.txt", text("a"))
    write_whole(tmp_path / "a.zarr", folder)
    assert order == ["a.txt", "rename", tmp_path.name, "chunk", "a.zarr", "rename", tmp_path.name]


def test_an_error_of_the_content_is_not_taken_for_one_of_the_disk(tmp_path):
    def write(part):
        try:
            (tmp_path / "absent").read_text()
        except OSError:
            raise DataError("no such cells") from None

    with pytest.raises(DataError, match="no such cells"):
        write_whole(tmp_path / "a.txt", write)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "a.txt", lambda part: 1 / 0)
    assert names(tmp_path) == []


# -- a disk that is full for real

SIZE = 300_000


@contextmanager
def small_place(folder: Path, kind: str) -> Iterator[Path]:
    """A folder with room for 300 kB: a file system of its own, or else a limit on the size of each file."""
    folder.mkdir()
    if kind == "full":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
        ended = subprocess.run(mount, capture_output=True, text=True)
        if ended.returncode:
            pytest.skip(f"mount is not allowed here ({ended.stderr.strip()}); the limit on sizes is tried")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["full", "limit"])
def small(request, tmp_path):
    """A folder with room for 300 kB."""
    with small_place(tmp_path / "small", request.param) as folder:
        yield folder


@pytest.fixture(scope="module")
def screen():
    return co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=60, n_genes=40)


@pytest.fixture(scope="module")
def vae(screen):
    co.split(screen)
    return co.new_vae(screen, n_latent=4, n_hidden=2000)


def save_checkpoint(folder, screen, vae):
    path = folder / "last.pt"
    co.VAETrainer(screen, vae, progress=False).save_checkpoint(path)


def save_models(folder, screen, vae):
    write_models(folder / "model.safetensors", vae)


def write_cells(folder, screen, vae):
    parts = []
    for k in range(40):
        part = screen.copy()
        part.obs_names = [f"{k}, {name}" for name in part.obs_names]
        part.obsm["X_nbvae"] = np.random.default_rng(k).normal(size=(len(part), 32))
        parts.append(part)
    write_parts(folder / "cells.h5ad", parts, {}, total=len(parts))


def save_a_figure(folder, screen, vae):
    figure = Figure(figsize=(8, 8))
    figure.add_subplot().imshow(np.random.default_rng(0).random((900, 900)), interpolation="nearest")
    style.finish(figure, save=folder / "figure.png")


def draw_live(folder, screen, vae):
    noise = np.random.default_rng(0).bytes(400_000)
    co.LivePlot(path=folder / "live.png")._write_file(noise)


def write_table(folder, screen, vae):
    table = pd.DataFrame(np.random.default_rng(0).random((20_000, 3)))
    write_whole(folder / "table.csv", lambda part: table.to_csv(part))


def write_zarr(folder, screen, vae):
    cells = AnnData(np.random.default_rng(0).random((400, 400)))
    write_whole(folder / "cells.zarr", cells.write_zarr)


def write_numbers(folder, screen, vae):
    runs.write_json(
        runs.metrics_file(folder, "02_train_vae"), {"values": np.random.default_rng(0).random(40_000)}
    )


WRITERS = [
    save_checkpoint, save_models, write_cells, save_a_figure, draw_live, write_table, write_zarr,
    write_numbers,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning")
def test_a_full_disk_is_said_in_three_beats_and_leaves_no_half_file(small, screen, vae, write, request):
    """For real: torch, safetensors, HDF5, zarr, PIL and pandas each say it in words of their own."""
    if write is write_zarr and request.node.callspec.params["small"] == "limit":
        pytest.skip("a limit on the size of a file does not stop a store of many small ones")
    with pytest.raises(StorageError) as refusal:
        write(small, screen, vae)
    said = str(refusal.value)
    assert said.startswith(f"Expected to write {small}/")
    assert re.search(
        r"Found (no space left on the device: .* of .* are free|a limit on the size of files)\.", said
    )
    assert "To fix it: " in said and len(said.splitlines()) == 1
    assert [path for path in small.rglob("*") if path.is_file()] == []


def test_a_notebook_that_no_longer_fits_keeps_its_last_whole_state(small, tmp_path, write_notebook):
    book = write_notebook(tmp_path / "01_big.ipynb", "n: int = 1", "print(n)", "print('x' * 600_000)")
    outcome = runs.execute(book, small)
    assert outcome.error.startswith(f"StorageError: Expected to write {small}/01_big.ipynb. Found ")
    assert [path.name for path in small.iterdir()] == ["01_big.ipynb"]
    assert nbformat.read(outcome.output, 4).cells[1].outputs[0].text == "1\n"


BIG = "print('x' * 600_000)"


def shell(*words: object, room: int | None = None) -> subprocess.CompletedProcess:
    """The command line, below a limit on the size of files where the disk itself is not small."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))) if room else None
    command = [sys.executable, "-m", "cellop_nb", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(co.__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limit)


def test_the_shell_learns_of_a_full_disk_and_run_json_of_what_was_done(small, tmp_path, write_notebook):
    write_notebook(tmp_path / "books" / "01_first.ipynb", "n: int = 1", "print(n)")
    write_notebook(tmp_path / "books" / "02_big.ipynb", "n: int = 1", BIG)
    ended = shell("run", "--notebooks", tmp_path / "books", "--runs", small, "--name", "mine")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr and "Expected to write" in ended.stderr
    record = json.loads((small / "mine" / "run.json").read_text())
    assert record["state"] == "failed"
    errors = {name: told["error"][:12] for name, told in record["notebooks"].items()}
    assert errors == {"01_first": "", "02_big": "StorageError"}


def test_what_run_json_was_to_hold_is_said_where_it_does_not_fit(tmp_path, write_notebook):
    fill = "f = open('filler', 'wb', buffering=0)\nwhile True: f.write(bytes(1024))"
    write_notebook(tmp_path / "books" / "01_first.ipynb", "n: int = 1", fill)
    with small_place(tmp_path / "small", "full") as folder:
        ended = shell("run", "--notebooks", tmp_path / "books", "--runs", folder, "--name", "mine")
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert f"Expected to write {folder}/mine/run.json. Found no space left" in ended.stderr
        assert '"state": "failed"' in ended.stderr
        assert json.loads((folder / "mine" / "run.json").read_text()) == {"state": "running"}


def test_predicted_cells_that_do_not_fit_end_the_command_with_1(tmp_path, screen):
    """From the start of the process: below a limit on the size of its files."""
    screen.write_h5ad(tmp_path / "screen.h5ad")
    model = co.CellOp(screen, n_latent=2)
    brief = {"n_hidden": 8, "vae_epochs": 1, "finish_epochs": 1, "operator_epochs": 1, "n_folds": 2}
    model.recipe = replace(model.recipe, **brief)
    model.fit(progress=False).save(tmp_path / "model")
    before = sorted(tmp_path.iterdir())
    words = (
        "--data",
        tmp_path / "screen.h5ad",
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "cells.h5ad",
    )
    asked = ("--context", "type A", "--perturbation", "drug 1")
    ended = shell("predict", *words, *asked, room=20_000)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"Expected to write {tmp_path}/cells.h5ad. Found a limit")
    assert sorted(tmp_path.iterdir()) == before
