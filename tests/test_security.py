"""Nothing from data or files is run: no pickle, no markup from labels, no server that others can reach."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import cellop_nb
from cellop_nb.models.operators import Condition
from cellop_nb.training.checkpoint import read_models

PACKAGE = Path(cellop_nb.__file__).parent
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if "_share" not in path.parts]
NOTEBOOKS = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
EVIL = "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"


def calls(tree: ast.AST):
    """Every call as (dotted name, keywords)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            yield ast.unparse(node.func), keywords


def dangers(source: str) -> list[str]:
    """What in a source text could run what a file or a label holds."""
    tree = ast.parse(source)
    found = []
    for name, keywords in calls(tree):
        last = name.rpartition(".")[2]
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name in {"np.load", "numpy.load"} and keywords.get("allow_pickle") is not False:
            found.append("np.load without allow_pickle=False")
        if name == "yaml.load" or name in {"eval", "exec", "compile", "os.system"}:
            found.append(name)
        foreign = last in {"load", "loads"} and name.startswith(("pickle.", "joblib."))
        if foreign or last in {"read_pickle", "Unpickler"}:
            found.append(name)
        if keywords.get("shell") is True:
            found.append(f"{name} with a shell")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "") in {
            "pickle",
            "joblib",
            "dill",
            "cloudpickle",
        }:
            found.append(f"from {node.module}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "eval(text)", "yaml.load(text)",
        "pickle.load(file)", "pd.read_pickle(path)", "subprocess.run(line, shell=True)", "from joblib import load",
    ],
)  # fmt: skip
def test_a_danger_is_noticed(source):
    assert dangers(source)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_named_h5ad_or_model_runs_nothing(tmp_path):
    """Not even looked at as a pickle: the witness file would appear."""
    import hashlib
    import pickle

    from cellop_nb.training import checkpoint

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "witness"),)

    for name in ("screen.h5ad", "model.safetensors", "last.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(cellop_nb.errors.CellopError):
        cellop_nb.datasets.load(tmp_path / "screen.h5ad")
    with pytest.raises(cellop_nb.errors.CellopError):
        read_models(tmp_path / "model.safetensors")
    adata = cellop_nb.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=20, n_genes=20)
    cellop_nb.split(adata)
    trainer = cellop_nb.VAETrainer(adata, cellop_nb.new_vae(adata, n_latent=2), progress=False)
    with pytest.raises(cellop_nb.errors.CheckpointError, match="does not end with the digest"):
        trainer.load_checkpoint(tmp_path / "last.pt")
    content = pickle.dumps(Evil())  # sealed as our own files are
    (tmp_path / "last.pt").write_bytes(
        content + checkpoint._SEAL + hashlib.sha256(content).hexdigest().encode()
    )
    with pytest.raises(cellop_nb.errors.CheckpointError, match="never run"):
        trainer.load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "witness").exists()


# -- labels


def screen_of(label: str):
    adata = cellop_nb.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=20, n_genes=20)
    for key, old in (("perturbation", "drug 1"), ("cell_type", "type A")):
        labels = adata.obs[key].astype(str)
        adata.obs[key] = labels.where(labels != old, label).to_numpy()
    return adata


def scores(label: str) -> pd.DataFrame:
    rows = [("A", label, f"A, {label}", method, "e_distance", 1.0, "") for method in ("operators", label)]
    return pd.DataFrame(
        rows, columns=["context", "perturbation", "group", "method", "metric", "value", "reason"]
    )


def shown_groups():
    return cellop_nb.Groups(screen_of(EVIL), use_rep="X_truth")._repr_html_()


def shown_holdout():
    from anndata import AnnData

    from cellop_nb.analysis.holdout import Holdout

    table = scores(EVIL).assign(question=EVIL, seed=0)
    return Holdout(table, AnnData(), pd.DataFrame(), pd.DataFrame())._repr_html_()


def fitted_predictor():
    """A model that is fitted at once, of a screen in which everything is called by the label."""
    from cellop_nb.analysis.cellop import Recipe

    adata = screen_of(EVIL)
    adata.var_names = [EVIL, *adata.var_names[1:]]
    model = cellop_nb.CellOp(adata, n_latent=2)
    model.recipe = Recipe(n_hidden=8, vae_epochs=1, finish_epochs=1, operator_epochs=1, n_folds=2)
    return model.fit(progress=False)


def shown_predictor():
    return fitted_predictor()._repr_html_()


def shown_plan():
    return fitted_predictor().plan("type B", EVIL)._repr_html_()


def shown_choice():
    from cellop_nb.analysis.cellop import Choice

    return Choice(pd.DataFrame({"estimator": [EVIL], "left": [0.5], "weight": [1.0]}))._repr_html_()


def shown_sentence():
    from IPython.display import Markdown  # noqa: F401 - what the notebooks' sentences are
    from nbconvert.filters import markdown2html

    from cellop_nb.display import markdown

    return markdown2html(markdown(f"**{EVIL}** is at its floor").data)


def shown_table():
    from cellop_nb.display import styled

    frame = pd.DataFrame({EVIL: [EVIL, "x"], "number": [0.5, 1.0]}, index=[EVIL, "y"])
    return styled(frame, precision=2).to_html()


def shown_setting():
    from cellop_nb.notebook.controls import readable

    return readable(EVIL)


def shown_vae():
    return cellop_nb.NBVAE([EVIL, "gene"], n_latent=2, covariates={EVIL: ["a"]})._repr_html_()


def shown_operators():
    return cellop_nb.OperatorModel(2, [EVIL], [EVIL])._repr_html_()


def shown_operator():
    return cellop_nb.OperatorModel(2, [EVIL], ["A"]).operator(Condition((EVIL,), "A"))._repr_html_()


def shown_trainer():
    adata = screen_of("plain")
    cellop_nb.split(adata)
    trainer = cellop_nb.VAETrainer(adata, cellop_nb.new_vae(adata, n_latent=2), progress=False)
    trainer.stop(EVIL)
    return trainer._repr_html_()


def shown_answer():
    from cellop_nb.notebook.virtual import Question, VirtualCells

    adata = screen_of(EVIL)
    cellop_nb.split(adata)
    vae = cellop_nb.new_vae(adata, n_latent=2)
    cellop_nb.embed(adata, vae)
    operators = cellop_nb.new_operators(adata)
    model = cellop_nb.CellOp(adata, n_genes=None, vae=vae, operators=operators).fit(progress=False)
    return VirtualCells(model).ask(Question(EVIL, EVIL))._repr_html_()


def shown_split():
    return cellop_nb.split(screen_of(EVIL))._repr_html_()


def shown_history():
    from cellop_nb.display import History

    history = History([{"epoch": 0, EVIL: 1.0, "by_hand": f"{EVIL} 1 after step 0"}])
    history.monitor = EVIL
    return history._repr_html_()


def shown_scores():
    from cellop_nb.display import Scores

    return Scores(scores(EVIL))._repr_html_()


SHOWN = {
    "NBVAE": shown_vae, "OperatorModel": shown_operators, "AffineOperator": shown_operator,
    "Trainer": shown_trainer, "Answer": shown_answer,
    "Table": shown_split, "History": shown_history, "Scores": shown_scores,
    "Groups": shown_groups, "Holdout": shown_holdout, "CellOp": shown_predictor, "Plan": shown_plan,
    "Choice": shown_choice,
    "markdown": shown_sentence, "styled": shown_table, "readable": shown_setting,
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_labels_show_as_text(name):
    html = SHOWN[name]()
    assert "&lt;script&gt;" in html
    assert not re.search(r"<(script|img)", html)


def test_no_html_view_is_forgotten():
    classes = {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(getattr(part, "name", "") in {"_repr_html_", "_repr_markdown_"} for part in node.body)
    }
    assert classes <= set(SHOWN), "add a view of a label to SHOWN"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_escape_what_they_say(path):
    """Sentences go through cellop_nb.display.markdown, and nothing is written as HTML."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not re.search(
                r"\b(Markdown|HTML)\(|import (.*, )?(Markdown|HTML)\b|\.style\.", cell.source
            )


@pytest.mark.browser
def test_labels_show_as_text_in_a_browser(tmp_path):
    """The same views on one page in Chromium: the title would change if any of the scripts ran."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.fail("no chromium; install it with the system's package manager")
    from playwright.sync_api import sync_playwright

    body = "".join(f"<section id={name}>{view()}</section>" for name, view in SHOWN.items())
    (tmp_path / "page.html").write_text(f"<title>quiet</title>{body}")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=flags)
        page = chromium.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        assert page.title() == "quiet"
        for name in SHOWN:
            assert "<script>document.title = 'run'</script>" in page.locator(f"#{name}").inner_text()
        page.set_content(f"<title>quiet</title>{EVIL}")
        assert page.title() == "run", "the test's own script does not run: it proves nothing"
        chromium.close()


# -- JupyterLab


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(url: str) -> int:
    """Status of a page; the address is printed a moment before the server listens."""
    for _ in range(60):
        try:
            return urllib.request.urlopen(url, timeout=5).status
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"nothing listens at {url}")


@pytest.mark.slow
def test_jupyterlab_listens_on_this_machine_alone_and_asks_for_its_token(root, tmp_path):
    port = free_port()
    private = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    surroundings = {**os.environ, **private, "PYTHONPATH": str(root)}
    surroundings.pop("JUPYTER_TOKEN", None)
    options = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--allow-root"]
    server = subprocess.Popen(
        [sys.executable, "-m", "cellop_nb", "lab", "--", *options], env=surroundings, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        token = wait_for_token(server)
        assert status(f"http://127.0.0.1:{port}/api/contents?token={token}") == 200
        assert status(f"http://127.0.0.1:{port}/api/contents") == 403
        assert listening(port) == {"0100007F"}, "another address than 127.0.0.1"
    finally:
        os.killpg(server.pid, 15)
        server.communicate(timeout=30)


def wait_for_token(server: subprocess.Popen) -> str:
    deadline = time.monotonic() + 90
    for line in server.stdout:
        found = re.search(r"http://127\.0\.0\.1:\d+/\S*token=(\w{32,})", line)
        if found:
            return found[1]
        assert time.monotonic() < deadline, "JupyterLab did not start"
    raise AssertionError("JupyterLab ended")


def listening(port: int) -> set[str]:
    """Addresses that listen on a port, as the kernel of Linux writes them."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


# -- the statement in the docs

HELD = {
    "Nothing in a model": ["test_security.py::test_a_pickle_named_h5ad_or_model_runs_nothing",
                           "test_security.py::test_nothing_is_unpickled_or_evaluated"],
    "A model or checkpoint": ["test_damaged.py::test_damage_is_refused_with_the_path_and_a_way_out",
                              "training/test_checkpoint.py::test_sizes_are_checked_against_the_file_before_anything_of_that_size_is_"
                              "made"],
    "A damaged file": ["test_damaged.py::test_damage_is_refused_with_the_path_and_a_way_out"],
    "Labels and values": ["test_security.py::test_labels_show_as_text",
                          "test_security.py::test_no_html_view_is_forgotten"],
    "`lab` listens": ["test_security.py::test_jupyterlab_listens_on_this_machine_alone_and_asks_for_its_token"],
    "A sweep or hold-out": ["notebook/test_sweep.py::test_a_sweep_on_this_machine_listens_on_no_port",
                            "test_security.py::test_workers_of_a_hold_out_listen_on_no_port"],
    "On a cluster": ["notebook/test_sweep.py::test_a_stranger_cannot_connect_to_the_scheduler_of_a_sweep",
                     "notebook/test_sweep.py::test_a_scheduler_without_tls_is_refused"],
    "Files are written": ["test_files.py::test_planted_links_are_never_followed",
                          "test_files.py::test_the_mode_of_an_earlier_file_is_kept"],
    "A name from data": ["test_errors.py::test_a_bad_input_is_refused_in_three_beats_and_leaves_nothing"],
    "Nothing is sent": ["test_security.py::test_only_data_sets_open_a_connection",
                        "data/test_datasets.py::test_changed_source_is_refused"],
}  # fmt: skip
"""Beginning of each sentence of the statement, and the tests that hold it."""


def test_each_sentence_of_the_security_page_has_tests_that_are_there(root):
    page = (root / "docs" / "guides" / "security.md").read_text(encoding="utf-8")
    sentences = [line.removeprefix("- ") for line in page.splitlines() if line.startswith("- ")]
    assert [next(key for key in HELD if sentence.startswith(key)) for sentence in sentences] == list(HELD)
    for test in {name for names in HELD.values() for name in names}:
        file, _, name = test.partition("::")
        assert re.search(
            rf"^def {name}\(", (root / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE
        ), test


CONNECTIONS = {
    "requests",
    "urllib",
    "http",
    "socket",
    "pooch",
    "ftplib",
    "smtplib",
    "websocket",
    "aiohttp",
    "httpx",
}


def imported(path: Path) -> set[str]:
    """First part of what a source file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def test_only_data_sets_open_a_connection():
    assert [path.name for path in SOURCES if imported(path) & CONNECTIONS] == ["datasets.py"]


def test_workers_of_a_hold_out_listen_on_no_port():
    from cellop_nb.commands.ask import LocalWorkers

    workers = LocalWorkers(1)
    try:
        assert workers.submit(_listening_ports).result() == workers.submit(_listening_ports).result() == []
    finally:
        workers.cancel([])


def _listening_ports() -> list[int]:
    """Ports on which this process, or the one that started it, listens."""
    import psutil

    both = [psutil.Process(), psutil.Process().parent()]
    return [
        one.laddr.port
        for process in both
        for one in process.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    ]
