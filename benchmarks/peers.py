"""Published predictors and this package on the same questions: `python3 -m cellop_nb bench peers --data FILE.h5ad`.

The stimulated cells of each type of Kang et al.'s screen are held out in turn, and 1,000 variable genes are chosen on
the training cells. Each peer runs in an environment that is made once in the cache folder, with pinned versions, and is
asked by files. All are scored alike, as :func:`cellop_nb.score` does. They run one by one, in one thread, question by
question. `docs/peers.csv` gets a row for each question, seed and method, and what it has is not asked again. A peer that
cannot be installed or does not run is a row that says why.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import cellop_nb as co
from cellop_nb.analysis.baselines import BASELINES, Method, Prediction, Target, Training
from cellop_nb.analysis.metrics import EvaluationSpace, log1p_cp10k
from cellop_nb.analysis.scores import score_rules
from cellop_nb.commands.terminal import say
from cellop_nb.data.datasets import cache_folder
from cellop_nb.errors import DataError, LabelError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("peer_models.py")
TABLE, PICTURE = ROOT / "docs" / "peers.csv", ROOT / "docs" / "images" / "peers.png"
RULES = ("no change", "mean shift", "near mean shift", "linear")
CONTROL, FEWEST_CELLS, N_GENES = "control", 17, 1000
LONGEST = 2 * 3600
"""Seconds that a peer may take for one question."""

METRICS = {
    "e_distance": "energy",
    "pearson_delta": "pearson",
    "direction_match_de50": "top50_direction",
    "variance_ratio_de100": "variance_ratio",
    "replicate_share": "replicate_share",
}
"""Metrics of :func:`cellop_nb.score`, and the columns that they are in."""


@dataclass(frozen=True)
class Environment:
    """What is installed: requirements, and packages that come without theirs, which are outdated."""

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()


ENVIRONMENTS = {
    "torch": Environment(
        ("torch==2.13.0", "scvi-tools==1.4.2", "scanpy==1.11.5", "pandas<3", "biolord==0.0.3", "POT==0.9.6",
         "adjustText==1.3.0", "seaborn"),
        ("scgen==2.1.0", "scpram==0.0.3"),
    ),
    "lemur": Environment(("pylemur==0.3.1", "harmonypy<0.0.11", "pandas<3")),
    "cpa": Environment(("cpa-tools==0.8.8", "pyarrow<15")),  # of Python below 3.11: its row says so
    "jax": Environment(("cellflow-tools==0.0.9", "requests", "pandas<3")),
}  # fmt: skip
PEERS: dict[str, str | None] = {
    "cellop_nb": None,
    "scvi": "torch",
    "scgen": "torch",
    "lemur": "lemur",
    "scpram": "torch",
    "cellflow": "jax",
    "biolord": "torch",
    "cpa": "cpa",
}
"""The environment of each peer; None is this one. Peers whose versions agree share one."""


class PeerError(Exception):
    """A peer could not be installed or did not run; the message is the note of its row."""


@dataclass(frozen=True, eq=False)
class Question:
    """One context whose perturbed cells are held out.

    Attributes
    ----------
    train, real : training cells and held-out cells, with the genes that were chosen on training cells
    """

    context: str
    perturbation: str
    seed: int
    train: ad.AnnData
    real: ad.AnnData

    @classmethod
    def of(cls, screen: ad.AnnData, context: str, seed: int) -> Question:
        aside = ((screen.obs["context"] == context) & (screen.obs["perturbation"] != CONTROL)).to_numpy()
        genes = co.select_genes(screen[~aside], N_GENES, flavor="seurat", min_cells=10, split=None)
        train, real = screen[~aside, genes].copy(), screen[aside, genes].copy()
        return cls(context, str(real.obs["perturbation"].iloc[0]), seed, train, real)

    def labels(self) -> dict[str, str]:
        return {"context": self.context, "perturbation": self.perturbation, "control": CONTROL}

    def controls(self) -> ad.AnnData:
        """The cells to move."""
        obs = self.train.obs
        return self.train[((obs["context"] == self.context) & (obs["perturbation"] == CONTROL)).to_numpy()]


def run(
    data: Path | None,
    only: Sequence[str] = (),
    *,
    contexts: Sequence[str] = (),
    seeds: int = 1,
    out: Path = TABLE,
) -> pd.DataFrame:
    """Ask the peers what the table lacks, write each row as it comes, and return the whole table.

    Raises
    ------
    LabelError
        A peer that there is not.
    DataError
        No such file.
    """
    names = list(only) or list(PEERS)
    for name in names:
        if name not in PEERS:
            fix = did_you_mean(name, PEERS)
            raise LabelError(f"peers among {list(PEERS)}", repr(name), fix)
    if data is None or not data.is_file():
        fix = "give the screen of Kang et al. with --data FILE.h5ad"
        raise DataError("a screen in a file", "none" if data is None else str(data), fix)
    screen = read(data)
    sizes = screen.obs.groupby(["context", "perturbation"], observed=True).size().unstack(fill_value=0)
    table = (
        pd.read_csv(out) if out.exists() else pd.DataFrame(columns=["context", "seed", "method", "energy"])
    )
    for seed in range(seeds):
        for context in contexts or sorted(sizes.index[sizes.min(axis=1) >= FEWEST_CELLS]):
            methods = [name for name in names if not scored(table, context, seed, name).any()]
            question = Question.of(screen, context, seed) if methods else None
            for name in methods:
                assert question is not None
                table = joined(table, pd.DataFrame(answers(question, name)))
                table.round(4).to_csv(out, index=False)
                say(table.iloc[[-1]].round(3).to_csv(index=False, header=False).strip())
    return table


def scored(table: pd.DataFrame, context: str, seed: int, method: str) -> pd.Series:
    """Which row (row,) of the table has the method's score on a question."""
    same = (table["context"] == context) & (table["seed"] == seed) & (table["method"] == method)
    return same & table["energy"].notna()


def joined(table: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The table with rows that have no score in it yet; they take the place of notes why there was none."""
    key = ["context", "seed", "method"]
    new = rows[[not scored(table, *row).any() for row in rows[key].itertuples(index=False)]]
    replaced = table.set_index(key).index.isin(new.set_index(key).index)
    return pd.concat([table[~replaced], new], ignore_index=True) if len(table) else new.reset_index(drop=True)


def read(path: Path) -> ad.AnnData:
    """The screen under the names that the peers' files have: ``context`` and ``perturbation``."""
    screen = co.datasets.load(path)
    screen.obs["context"] = screen.obs["cell_type"].astype(str)
    screen.obs["perturbation"] = screen.obs["perturbation"].astype(str)
    co.setup(screen, perturbation_key="perturbation", context_key="context", control=CONTROL)
    return screen


def answers(question: Question, name: str, script: Path = SCRIPT) -> list[dict]:
    """Rows of the simple rules and of one peer; a note in place of the scores where it does not run."""
    common = {"context": question.context, "seed": question.seed, "date": datetime.date.today().isoformat()}
    try:
        cells = predicted(question, name, script)
    except PeerError as failure:
        return [common | {"method": name, "energy": np.nan, "note": str(failure)}]
    start = time.process_time()
    space = EvaluationSpace.fit(question.train, seed=question.seed)
    training = Training.of(question.train, space)
    fitted = time.process_time() - start
    rule = {"version": f"cellop_nb {co.__version__}", "space": "log1p", "fit_cpu_seconds": fitted}
    cost = {method: dict(rule) for method in RULES} | {name: dict(cells.uns["cost"])}

    def timed(method: str) -> Method:
        def call(training: Training, target: Target) -> Prediction:
            start = time.process_time()
            prediction = BASELINES[method](training, target)
            cost[method]["predict_cpu_seconds"] = time.process_time() - start
            return prediction

        return call

    def peer(training: Training, target: Target) -> Prediction:
        if cost[name]["space"] == "counts":
            return Prediction.of_counts(name, cells.X, target.space)
        return Prediction.of_cells(name, cells.X)

    table, _ = score_rules(
        {method: timed(method) for method in RULES} | {name: peer},
        [(question.context, question.perturbation)],
        training,
        question.real,
        lambda context: question.controls(),
        space,
        metrics=METRICS,
        seed=question.seed,
    )
    scores = table.pivot(index="method", columns="metric", values="value").rename(columns=METRICS)
    return [common | {"method": m} | scores.loc[m, [*METRICS.values()]].to_dict() | cost[m] for m in cost]


def predicted(question: Question, name: str, script: Path = SCRIPT) -> ad.AnnData:
    """The cells that a peer predicts in a fresh process of one thread; ``uns["cost"]`` says what they took."""
    python, folder = interpreter(PEERS.get(name)), tempfile.TemporaryDirectory()
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    surroundings = {
        **os.environ,
        **dict.fromkeys(threads, "1"),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT) if python == Path(sys.executable) else "",
    }
    with folder:
        train = ad.AnnData(
            question.train.X,
            obs=question.train.obs[["context", "perturbation"]],
            var=question.train.var[[]],
            uns={"question": question.labels()},
            layers={"log1p": log1p_cp10k(question.train.X)},
        )
        train.write_h5ad(Path(folder.name) / "train.h5ad")
        command = [str(python), str(script), name, folder.name, str(question.seed)]
        called(command, env=surroundings, cwd=folder.name)
        return ad.read_h5ad(Path(folder.name) / "predicted.h5ad")


def interpreter(name: str | None) -> Path:
    """The Python of an environment, which is made where it is not there with these requirements."""
    if name is None:
        return Path(sys.executable)
    chosen, folder = ENVIRONMENTS[name], cache_folder() / "peers" / name
    python, record = folder / "bin" / "python", folder / "requirements.json"
    contents = json.dumps([chosen.requirements, chosen.alone])
    if not record.exists() or record.read_text() != contents:
        say(f"making the environment {name} in {folder}")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        try:
            called([sys.executable, "-m", "venv", str(folder)])
            called([*pip, *chosen.requirements])
            if chosen.alone:
                called([*pip, "--no-deps", *chosen.alone])
        except PeerError as failure:
            version = ".".join(map(str, sys.version_info[:2]))
            raise PeerError(f"not installed with Python {version}: {failure}") from None
        record.write_text(contents)
    return python


def called(command: list[str], **options) -> None:
    """Run a command; where it fails, its last line is the reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, **options)
    except subprocess.TimeoutExpired:
        raise PeerError(f"not ready after {LONGEST} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PeerError(lines[-1][:300])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each method: mean and worst over the types that it answered, seeds averaged; best first, notes last."""
    scores = table.dropna(subset="energy")
    scores = scores.assign(cpu_seconds=scores["fit_cpu_seconds"] + scores["predict_cpu_seconds"])
    columns = ["energy", "pearson", "cpu_seconds", "peak_mb"]
    types = scores.groupby(["method", "context"])[columns].mean().groupby("method")
    shared = (
        scores[scores["context"].isin(shared_types(table))].groupby("method")[["energy", "pearson"]].mean()
    )
    rows = types.mean().assign(worst=types["energy"].max(), types=types.size())
    rows = rows.join(shared.add_prefix("shared_"))
    rows["version"] = scores.groupby("method")["version"].last()
    silent = [name for name in table["method"].unique() if name not in rows.index]
    return rows.reindex([*rows.sort_values("shared_energy").index, *silent])


def shared_types(table: pd.DataFrame) -> list[str]:
    """Held-out types that every method with a score has answered."""
    counts = table.dropna(subset="energy").groupby("context")["method"].nunique()
    return [str(name) for name in counts.index[counts == table.dropna(subset="energy")["method"].nunique()]]


def page(table: pd.DataFrame) -> str:
    """The README's table, as Markdown: the best on the types that all methods answered first; a dash: it did not run."""
    shared = shared_types(table)
    title = shared[0] if len(shared) == 1 else f"{len(shared)} types"
    head = ["method", "version", title, "Pearson", "types", "mean", "worst", "CPU seconds", "peak, MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    methods = summary(table)
    for name, row in methods.iterrows():
        cells = [str(name)] + ["–"] * (len(head) - 1)
        if row["types"] > 0:
            seconds = f"{row['cpu_seconds']:.0f}" if row["cpu_seconds"] >= 1 else "< 1"
            peak = "–" if np.isnan(row["peak_mb"]) else f"{row['peak_mb']:.0f}"
            version = "–" if name in RULES else row["version"]
            on_shared = [f"{row[key]:.2f}" for key in ("shared_energy", "shared_pearson")]
            whole = (
                row["types"] == methods["types"].max()
            )  # a mean over fewer types would be of other questions
            over_all = [f"{row[key]:.2f}" if whole else "–" for key in ("energy", "worst")]
            cells = [str(name), version, *on_shared, f"{row['types']:.0f}", *over_all, seconds, peak]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(table: pd.DataFrame) -> None:
    """The README's picture."""
    from .figures import peers

    peers(table[table["context"].isin(shared_types(table))]).savefig(PICTURE, dpi=150, bbox_inches="tight")
