"""Data sets by name, through a cache that notices truncated and changed files."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading

import anndata
import h5py
import numpy as np
import pytest

from cellop_nb.data import datasets
from cellop_nb.data.contract import setup
from cellop_nb.data.datasets import SCREENS, Screen, scperturb
from cellop_nb.errors import DataError


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `truncate` promises whole files and sends half, `hide_length` promises nothing."""

    truncate = hide_length = False
    requests: list[str] = []

    def do_GET(self):
        type(self).requests.append(self.path)
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                body = file.read()
        except OSError:
            return self.send_error(404)
        self.send_response(200)
        if not self.hide_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.truncate else body)
        self.close_connection = True
        return None

    def log_message(self, *args):
        """Keep the test's output clean."""


@pytest.fixture
def server(tmp_path, monkeypatch, screen):
    """A local source of one public screen, `remote`, and an empty cache."""
    source = tmp_path / "source"
    source.mkdir()
    screen.obs = screen.obs.rename(
        columns={"perturbation": "label", "donor": "replicate", "cell_type": "celltype"}
    )
    screen.obs["label"] = screen.obs["label"].cat.rename_categories(
        {"control": "ctrl", "drug 1+drug 2": "drug 1_drug 2"}
    )
    del screen.uns["cellop_nb"]
    screen.write_h5ad(source / "remote.h5ad")
    handler = type("Fresh", (Handler,), {"requests": []})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=source)
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}/remote.h5ad"
        entry = Screen("remote", "A screen", "Someone (2020)", url, 400, control=("ctrl",), joiner="_")
        monkeypatch.setattr(datasets, "SCREENS", (entry,))
        monkeypatch.setenv("CELLOP_CACHE", str(tmp_path / "cache"))
        handler.folder, handler.cache = source, tmp_path / "cache"
        yield handler
        httpd.shutdown()


def test_download_is_cached_recorded_and_named_as_the_contract(server):
    adata = datasets.load("remote", progress=False)
    assert {"control", "drug 1", "drug 1+drug 2"} <= set(adata.obs["perturbation"])
    assert {"perturbation", "cell_type", "donor"} <= set(adata.obs)
    assert adata.uns["cellop_nb"]["source"]["obs_cell_type"] == "celltype"
    assert len(setup(adata)) == 10
    again = datasets.load("remote", progress=False)
    assert again.shape == adata.shape and server.requests == ["/remote.h5ad"]
    record = json.loads((server.cache / "checksums.json").read_text())
    assert list(record) == ["remote.h5ad"] and len(record["remote.h5ad"]) == 64
    row = datasets.list().set_index("name").loc["remote"]
    assert row["cached"] and row["mb"] == pytest.approx(
        (server.cache / "remote.h5ad").stat().st_size / 1e6, abs=0.1
    )
    assert row["keys"].startswith(
        "perturbation: perturbation | perturbation_name | condition | label; cell_type: "
    )


def test_progress_bar(server, capsys):
    datasets.load("remote", progress=True)
    assert "100%" in capsys.readouterr().err


def test_truncated_download_is_refused_and_leaves_nothing(server):
    server.truncate = True
    with pytest.raises(DataError, match="a complete download of remote"):
        datasets.load("remote", progress=False)
    assert not (server.cache / "remote.h5ad").exists()
    server.truncate = False
    assert datasets.load("remote", progress=False).n_obs == 400


def test_truncated_download_of_unknown_length_is_refused(server):
    server.truncate = server.hide_length = True
    with pytest.raises(DataError, match="truncated or no AnnData"):
        datasets.load("remote", progress=False)
    assert not (server.cache / "remote.h5ad").exists() and not (server.cache / "checksums.json").exists()


def test_a_damaged_record_of_checksums_is_refused(server):
    datasets.load("remote", progress=False)
    (server.cache / "checksums.json").write_text("{")
    with pytest.raises(DataError, match="checksums in .*checksums.json.*delete it"):
        datasets.load("remote", progress=False)


def test_changed_cache_is_refused(server):
    datasets.load("remote", progress=False)
    with open(server.cache / "remote.h5ad", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="has changed since.*delete it to download it again"):
        datasets.load("remote", progress=False)


def test_changed_source_is_refused(server):
    datasets.load("remote", progress=False)
    (server.cache / "remote.h5ad").unlink()
    adata = anndata.read_h5ad(server.folder / "remote.h5ad")
    adata[:50].write_h5ad(server.folder / "remote.h5ad")
    with pytest.raises(DataError, match="another file at its source"):
        datasets.load("remote", progress=False)
    assert not (server.cache / "remote.h5ad").exists()


def test_offline_says_what_is_cached(server, tmp_path, monkeypatch):
    datasets.load("remote", progress=False)
    absent = Screen("absent", "", "", "http://127.0.0.1:9/absent.h5ad")
    monkeypatch.setattr(datasets, "SCREENS", (*datasets.SCREENS, absent))
    with pytest.raises(DataError, match="check the connection.*synthetic_screen, remote"):
        datasets.load("absent", progress=False)


def test_missing_at_the_source(server):
    (server.folder / "remote.h5ad").unlink()
    with pytest.raises(DataError, match="a complete download of remote.*HTTPError"):
        datasets.load("remote", progress=False)


def test_files_load_as_they_are(screen, tmp_path):
    screen.write_h5ad(tmp_path / "mine.h5ad")
    screen.write_zarr(tmp_path / "mine.zarr")
    for name in ("mine.h5ad", "mine.zarr"):
        assert (datasets.load(tmp_path / name).X != screen.X).nnz == 0
    backed = datasets.load(str(tmp_path / "mine.h5ad"), backed=True)
    assert not hasattr(backed.X, "nnz") and (backed[:].X != screen.X).nnz == 0


def rename_column(table, old, new):
    """As other programs write it: anndata itself refuses such names."""
    table[new] = table[old][:]
    for name, value in table[old].attrs.items():
        table[new].attrs[name] = value
    del table[old]
    order = [new if name == old else name for name in table.attrs["column-order"]]
    table.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


@pytest.mark.parametrize("backed", [False, True])
def test_columns_that_no_file_can_hold_get_other_names(screen, tmp_path, backed, caplog):
    screen.obs["percent"], screen.var["names"] = 1.5, screen.var_names.to_numpy()
    screen.raw = screen
    screen.write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "a") as file:
        rename_column(file["obs"], "percent", "pct/mt")
        rename_column(file["raw/var"], "names", "_index_of")
        file["raw/var"].move("_index_of", "names")
        rename_column(file["raw/var"], file["raw/var"].attrs["_index"], "features")
        file["raw/var"].move("names", "_index")
        file["raw/var"].attrs["_index"] = "features"
        file["raw/var"].attrs["column-order"] = np.array(["_index"], dtype=h5py.string_dtype())
    adata = datasets.load(tmp_path / "screen.h5ad", backed=backed)
    assert (adata.obs["pct_mt"] == 1.5).all() and "pct/mt" not in adata.obs
    assert "'pct/mt': 'pct_mt'" in caplog.text
    adata = adata if not backed else adata.to_memory()
    assert backed or list(adata.raw.var["index"]) == list(screen.var_names)
    adata.write_h5ad(tmp_path / "again.h5ad")
    adata.write_zarr(tmp_path / "again.zarr")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kang_2017", "did you mean 'kang_2018'"),
        ("nowhere.h5ad", "neither at 'nowhere.h5ad'"),
        ("synthetic_scren", "did you mean 'synthetic_screen'"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(DataError, match=message):
        datasets.load(name)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "broken.h5ad").write_bytes(b"no hdf5")
    with pytest.raises(DataError, match="a file .h5ad or .zarr"):
        datasets.load(tmp_path / "table.csv")
    with pytest.raises(DataError, match="a readable .h5ad"):
        datasets.load(tmp_path / "broken.h5ad")
    with pytest.raises(DataError, match="the name of a public screen"):
        datasets.fetch("kang_1918")


def test_catalogue_is_complete():
    table = datasets.list()
    assert table["name"].is_unique and len(table) == len(SCREENS) + 1
    assert (table[["title", "citation", "licence", "keys"]] != "").all(axis=None)
    assert "perturbation: label; " in table.set_index("name").loc["kang_2018", "keys"]
    assert table["url"][1:].str.match(r"https://\S+\.h5ad$").all()
    assert datasets.find("scperturb/SomeFile") == scperturb("SomeFile")
    assert datasets.find("scperturb/a/b") is None


def test_example_is_found_in_a_clone_and_in_a_wheel(root, tmp_path, monkeypatch):
    assert datasets.example_path() == root / "data" / "synthetic_screen.h5ad"
    package = tmp_path / "site-packages" / "cellop_nb"
    (package / "_share" / "data").mkdir(parents=True)
    monkeypatch.setattr(datasets, "files", lambda name: package)
    assert datasets.example_path() is None
    assert datasets.load().n_obs == 4800, "without its file the example is made afresh"
    shutil.copy(root / "data" / "synthetic_screen.h5ad", package / "_share" / "data")
    assert datasets.example_path().parent.parent.name == "_share"
