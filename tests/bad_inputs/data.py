"""Wrong counts, labels and splits."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

import cellop_nb as co

from .cases import COMMANDS, COUNTS, FILES, LABELS, SPLIT, case, command

# -- counts


@case(
    COUNTS,
    "log-normalised values where counts are due; the counts are in a layer",
    found="0.693147 in cell 'cell_00000', gene 'GENE0000' (4,840 such values); it looks log-normalised",
)
def _(place):
    place.adata.layers["counts"] = place.adata.X.copy()
    place.adata.X = place.adata.X.log1p()
    co.setup(place.adata)


@case(
    COUNTS,
    "log-normalised values; the counts are in raw",
    found="0.693147 in cell 'cell_00000', gene 'GENE0000' (4,840 such values); it looks log-normalised",
)
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = place.adata.X.log1p()
    co.setup(place.adata)


@case(
    COUNTS,
    "values normalised to the same total",
    found="49.505 in cell 'cell_00000', gene 'GENE0000' (4,702 such values); it looks normalised to 1e+04 per cell",
)
def _(place):
    dense = place.adata.X.toarray()
    place.adata.X = 1e4 * dense / dense.sum(1, keepdims=True)
    co.setup(place.adata)


@case(
    COUNTS,
    "scaled values, some negative",
    found="negative values: -1 in cell 'cell_00000', gene 'GENE0002' (4,760 such values); scaled or corrected data",
)
def _(place):
    place.adata.X = place.adata.X.toarray() - 1.0
    co.setup(place.adata)


@case(COUNTS, "NaN among the counts", found="nan in cell 'cell_00003', gene 'GENE0005' (1 such value)")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[3, 5] = np.nan
    co.setup(place.adata)


@case(COUNTS, "a cell without counts", found="1 without any, such as 'cell_00007'")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[7] = 0
    co.setup(place.adata)


@case(COUNTS, "a layer that is not there", found="no such layer")
def _(place):
    place.adata.layers["counts"] = place.adata.X
    co.setup(place.adata, layer="count")


@case(COUNTS, "nothing in X", found="X is empty")
def _(place):
    place.adata.X = None
    co.setup(place.adata)


@case(COUNTS, "no cells left after a filter", found="0 cells and 40 genes")
def _(place):
    co.setup(place.adata[:0].copy())


@case(COUNTS, "a path instead of an AnnData object", found="a str")
def _(place):
    co.setup("screen.h5ad")


@case(COUNTS, "repeated gene names", found="1 repeated in var_names, such as 'gene 1'")
def _(place):
    place.adata.var_names = ["gene 1", *place.adata.var_names[1:-1], "gene 1"]
    co.setup(place.adata)


@case(COUNTS, "repeated cell names", found="239 repeated in obs_names, such as 'AAACG'")
def _(place):
    place.adata.obs_names = ["AAACG"] * place.adata.n_obs
    co.setup(place.adata)


@case(COUNTS, "a synthetic screen of too few dimensions", found="2")
def _(place):
    co.datasets.synthetic(n_latent=2)


@case(
    COUNTS,
    "log-normalised values into the trainer",
    found="0.693147 in cell 'cell_00000', gene 'GENE0000' (4,840 such values); it looks log-normalised",
)
def _(place):
    vae = place.vae
    place.adata.X = place.adata.X.log1p()
    co.VAETrainer(place.adata, vae, max_epochs=1, progress=False).fit()


def at(row, column, value):
    """One value of the matrix replaced."""

    def change(x):
        x[row, column] = value
        return x

    return change


FIRST = "in cell 'cell_00000', gene 'GENE0000'"
MATRICES = {
    "truth values where counts are due": (lambda x: x > 0, "values of type bool"),
    "objects where counts are due": (lambda x: x.astype(object), "values of type object"),
    "complex numbers where counts are due": (lambda x: x.astype(complex), "values of type complex128"),
    "a count that no tool counts": (at(0, 0, 3e38), f"3e+38 {FIRST} (1 such value)"),
    "an infinite count": (at(2, 1, np.inf), "inf in cell 'cell_00002', gene 'GENE0001' (1 such value)"),
    "one negative count": (
        at(0, 0, -1),
        f"negative values: -1 {FIRST} (1 such value); scaled or corrected data",
    ),
    "counts computed back from logarithms": (
        lambda x: x + 1e-5 * (x > 0),
        "1.00001 in cell 'cell_00000', gene 'GENE0000' (4,840 such values); they are whole but for rounding, as after "
        "undoing a logarithm",
    ),
    "counts over size factors": (
        lambda x: x / np.linspace(0.5, 2, len(x))[:, None] / 1.3,
        "1.53846 in cell 'cell_00000', gene 'GENE0000' (4,839 such values); it looks normalised by a factor per cell",
    ),
    "log2 of normalised counts": (
        lambda x: np.log2(1 + x / x.sum(1, keepdims=True) * 1e4),
        "5.65835 in cell 'cell_00000', gene 'GENE0000' (4,840 such values); it looks log2-normalised",
    ),
    "counts shared out between genes, as alevin writes": (
        lambda x: x * np.where(np.arange(40) % 7, 1, 0.37),
        "0.37 in cell 'cell_00000', gene 'GENE0000' (725 such values); it looks corrected or averaged (85% are whole): "
        "alevin, SoupX and CellBender do that",
    ),
    "counts less the ambient ones, as SoupX writes": (
        lambda x: x * np.linspace(0.81, 0.97, 40),
        "0.81 in cell 'cell_00000', gene 'GENE0000' (4,839 such values); it looks corrected or averaged (0% are whole): "
        "alevin, SoupX and CellBender do that",
    ),
}


def spoiled(place, change):
    place.adata.X = change(place.adata.X.toarray().astype(float))
    co.setup(place.adata)


for title, (change, found) in MATRICES.items():
    case(COUNTS, title, found=found)(lambda place, change=change: spoiled(place, change))


@case(COUNTS, "counts that dask has yet to compute", found="a dask array")
def _(place):
    import dask.array

    place.adata.X = dask.array.from_array(place.adata.X.toarray(), chunks=(100, 40))
    co.setup(place.adata)


@case(COUNTS, "a gene index beyond the genes", found="the gene index 60")
def _(place):
    place.adata.X.indices[7] = 60
    co.setup(place.adata)


@case(COUNTS, "a cell index beyond the cells", found="the cell index 9999")
def _(place):
    place.adata.X = place.adata.X.tocsc()
    place.adata.X.indices[7] = 9999
    co.setup(place.adata)


@case(COUNTS, "a matrix whose rows end before they begin", found="row pointers that fall")
def _(place):
    place.adata.X.indptr[3] = 0
    co.setup(place.adata)


@case(
    COUNTS,
    "guides among the genes",
    found="2 other features (CRISPR Guide Capture), such as 'GENE0038'",
)
def _(place):
    place.adata.var["feature_types"] = ["Gene Expression"] * 38 + ["CRISPR Guide Capture"] * 2
    co.setup(place.adata)


@case(COUNTS, "counts in raw and nowhere else", found="X is empty")
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = None
    co.setup(place.adata)


@case(COUNTS, "a table instead of an AnnData object", found="a DataFrame")
def _(place):
    co.setup(place.adata.to_df())


@case(COUNTS, "no genes left after a filter", found="240 cells and 0 genes")
def _(place):
    co.setup(place.adata[:, :0].copy())


@case(
    COUNTS,
    "totals that are logarithms",
    found="5.31321 against 202 counts in cell 'cell_00000'; these look like logarithms",
)
def _(place):
    place.split.obs["total_counts"] = np.log1p(np.asarray(place.adata.X.sum(1)).ravel())
    co.new_vae(place.adata, n_latent=2)


@case(COUNTS, "totals that are text", found="'many' in cell 'cell_00000'")
def _(place):
    place.adata.obs["total_counts"] = "many"
    co.CellOp(place.adata, n_latent=2).fit(progress=False)


# -- labels


@case(LABELS, "a perturbation column of another name", found="no such column")
def _(place):
    place.adata.obs = place.adata.obs.rename(columns={"perturbation": "perturbations"})
    co.setup(place.adata)


@case(LABELS, "a context column that is not there", found="no such column")
def _(place):
    co.setup(place.adata, context_key="celltype")


@case(LABELS, "another label for the controls", found="none")
def _(place):
    co.setup(place.adata, control="DMSO")


@case(LABELS, "a cell type without controls", found="none in 1 of them, such as 'type A'")
def _(place):
    obs = place.adata.obs
    co.setup(place.adata[~((obs.cell_type == "type A") & (obs.perturbation == "control"))].copy())


@case(LABELS, "nothing but controls", found="only 'control' in obs['perturbation']")
def _(place):
    co.setup(place.adata[place.adata.obs.perturbation == "control"].copy())


@case(
    LABELS,
    "cells without a label",
    found="5 cells without one, such as ['cell_00000', 'cell_00001', 'cell_00002']",
)
def _(place):
    place.adata.obs.loc[place.adata.obs_names[:5], "perturbation"] = None
    co.setup(place.adata)


def relabel(place, old, new):
    labels = place.adata.obs["perturbation"].astype(str)
    place.adata.obs["perturbation"] = labels.where(labels != old, new).to_numpy()


@case(LABELS, "two spellings of the control", found="'Control' and 'control'")
def _(place):
    relabel(place, "drug 1", "Control")
    co.setup(place.adata)


@case(LABELS, "a label with a blank at its end", found="'drug 1 '")
def _(place):
    relabel(place, "drug 1", "drug 1 ")
    co.setup(place.adata)


@case(LABELS, "a combination with the control", found="'drug 1+control'")
def _(place):
    relabel(place, "drug 1", "drug 1+control")
    co.setup(place.adata)


@case(LABELS, "a combination in two orders", found="'A+B' and 'B+A'")
def _(place):
    relabel(place, "drug 1", "A+B")
    relabel(place, "drug 2", "B+A")
    co.setup(place.adata)


@case(LABELS, "one column for both keys", found="'perturbation' twice")
def _(place):
    co.setup(place.adata, context_key="perturbation")


@case(LABELS, "a group of one cell", found="1 with one, such as 'drug 9' in 'type B'")
def _(place):
    labels = place.adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "drug 1")[0]] = "drug 9"
    place.adata.obs["perturbation"] = labels
    co.setup(place.adata)


LABEL = {
    "a perturbation in two spellings": ("drug 2", "Drug 1", "'drug 1' and 'Drug 1'"),
    "a control in another Unicode form": ("drug 1", "ｃontrol", r"'\uff43ontrol' and 'control'"),
    "a no-break space in a label": ("drug 1", "drug\u00a01", r"'drug\xa01'"),
    "a line break in a label": ("drug 1", "drug\n1", r"'drug\n1'"),
    "a label that means there is none": ("drug 1", "N/A", "the label 'N/A'"),
    "a combination with blanks around its plus": ("drug 1+drug 2", "drug 1 + drug 2", "'drug 1 + drug 2'"),
}


def labelled(place, old, new):
    labels = place.adata.obs["perturbation"].astype(str).to_numpy().copy()
    labels[3:9] = "drug 1+drug 2"  # beside the controls that stay
    labels[labels == old] = new
    place.adata.obs["perturbation"] = labels
    co.setup(place.adata)


for title, (old, new, found) in LABEL.items():
    case(LABELS, title, found=found)(lambda place, old=old, new=new: labelled(place, old, new))


SETTINGS = {
    "several controls": ({"control": ["control", "drug 1"]}, "['control', 'drug 1']"),
    "several columns of perturbations": ({"perturbation_key": ["perturbation"]}, "['perturbation']"),
    "a column by its position": ({"context_key": 0}, "0"),
    "one column of contexts twice": ({"context_key": ["donor", "donor"]}, "'donor' twice"),
    "no column of contexts in a list": ({"context_key": []}, "an empty list"),
    "doses in the column of perturbations": ({"dose_key": "perturbation"}, "'perturbation' twice"),
    "batches in the column of perturbations": ({"batch_key": "perturbation"}, "'perturbation' twice"),
    "a single perturbation that is none of the screen": ({"singles": ["drug 7"]}, "'drug 7'"),
}
for title, (settings, found) in SETTINGS.items():
    case(LABELS, title, found=found)(lambda place, settings=settings: co.setup(place.adata, **settings))


DOSES = {
    "doses with their unit": ("10 uM", "160 other values, such as '10 uM'"),
    "doses as logarithms": (-2.0, "160 other values, such as -2.0"),
    "doses with a decimal comma": ("0,5", "160 other values, such as '0,5'"),
    "dates for doses": (pd.Timestamp("2026-01-31"), "160 other values, such as 2026-01-31T00:00:00"),
}


def dosed(place, dose):
    place.adata.obs["dose"] = dose
    co.setup(place.adata, dose_key="dose")


for title, (dose, found) in DOSES.items():
    case(LABELS, title, found=found)(lambda place, dose=dose: dosed(place, dose))


@case(LABELS, "two columns of one name", found="2 columns of this name")
def _(place):
    place.adata.obs = pd.concat([place.adata.obs, place.adata.obs[["donor"]]], axis=1)
    co.setup(place.adata, context_key="donor")


@case(LABELS, "contexts whose names hold what joins them", found="'a | b' in obs['tissue']")
def _(place):
    place.adata.obs["tissue"] = "a | b"
    co.setup(place.adata, context_key=["cell_type", "tissue"])


@case(LABELS, "another tool's notes under the package's name", found="a str")
def _(place):
    place.adata.uns["cellop_nb"] = "version 3"
    co.setup(place.adata)


@case(LABELS, "a screen that was not set up", found="no keys in uns['cellop_nb']")
def _(place):
    del place.adata.uns["cellop_nb"]
    co.Groups(place.adata)


@case(LABELS, "two screens of different keys put together", found="no keys in uns['cellop_nb']")
def _(place):
    other = place.adata.copy()
    other.obs["treatment"] = other.obs["perturbation"].to_numpy()
    co.setup(other, perturbation_key="treatment")
    co.Groups(ad.concat([place.adata, other], index_unique="-"))


@case(LABELS, "controls dropped after setup", found="none")
def _(place):
    co.CellOp(place.adata[place.adata.obs["perturbation"] != "control"].copy()).fit(progress=False)


@case(LABELS, "a column dropped after setup", found="no such column")
def _(place):
    del place.adata.obs["cell_type"]
    co.CellOp(place.adata).fit(progress=False)


# -- splits


@case(SPLIT, "a hold-out that matches no cell", found="no such cell")
def _(place):
    co.split(place.adata, holdout={"cell_type": "type Z"})


@case(SPLIT, "a hold-out of an unknown column", found="no such column")
def _(place):
    co.split(place.adata, holdout={"celltype": "type A"})


@case(
    SPLIT,
    "a hold-out that leaves nothing to learn from",
    found="all 160 perturbed cells held out by {'perturbation': ['drug 1', 'drug 2']}",
)
def _(place):
    co.split(place.adata, holdout={"perturbation": ["drug 1", "drug 2"]})


@case(SPLIT, "fractions that leave no cell for training", found="test_fraction 0.6 and val_fraction 0.5")
def _(place):
    co.split(place.adata, test_fraction=0.6, val_fraction=0.5)


@case(SPLIT, "training without a split", found="cells without a split")
def _(place):
    co.new_vae(place.adata, n_latent=2)


@case(SPLIT, "a split by words of one's own", found="'Test'")
def _(place):
    place.adata.obs["split"] = np.where(np.arange(place.adata.n_obs) % 3, "Train", "Test")
    co.CellOp(place.adata).fit(progress=False)


@case(SPLIT, "nothing but test cells", found="all cells in it")
def _(place):
    place.adata.obs["split"] = "test"
    co.CellOp(place.adata).fit(progress=False)


@case(
    SPLIT,
    "cells that are in no split",
    found="140 cells without one, such as ['cell_00100', 'cell_00101', 'cell_00102']",
)
def _(place):
    place.adata.obs["split"] = np.where(np.arange(place.adata.n_obs) < 100, "train", None)
    co.CellOp(place.adata).fit(progress=False)


@case(
    SPLIT,
    "the same cells twice, put together after setup",
    found="240 repeated in obs_names, such as 'cell_00000'",
)
def _(place):
    co.CellOp(ad.concat([place.adata, place.adata], uns_merge="same")).fit(progress=False)


@case(
    SPLIT,
    "a context in turn that shares no perturbation with another",
    found="type A: none of its perturbations was measured elsewhere",
)
def _(place):
    obs = place.adata.obs
    alike = {"type A": "drug 1", "type B": "drug 2"}
    own = obs["perturbation"].astype(str) == obs["cell_type"].astype(str).map(alike)
    co.holdout(place.adata[own | (obs["perturbation"] == "control")].copy(), only=["type A"], progress=False)


# -- files


@case(FILES, "half precision in a sparse matrix")
def _(place):
    with h5py.File(place.h5ad, "a") as file:
        values = file["X/data"][:].astype(np.float16)
        del file["X/data"]
        file["X/data"] = values
    place.keep(place.h5ad)
    co.datasets.load(place.h5ad)


@case(FILES, "half precision in a sparse matrix, left on disk", found="values of type float16")
def _(place):
    with h5py.File(place.h5ad, "a") as file:
        values = file["X/data"][:].astype(np.float16)
        del file["X/data"]
        file["X/data"] = values
    place.keep(place.h5ad)
    co.setup(co.datasets.load(place.h5ad, backed=True))


@case(FILES, "a file of an anndata before 0.7, left on disk", found="an older one, /home/you/work/old.h5ad")
def _(place):
    path = place.folder / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = place.adata.X.toarray()
        file["obs"] = np.array([(name.encode(),) for name in place.adata.obs_names], dtype=[("index", "S10")])
    place.keep(path)
    co.datasets.load(path, backed=True)


@case(FILES, "a file that another program has open")
def _(place):
    with h5py.File(place.h5ad, "a"):
        import subprocess
        import sys

        lines = f"import cellop_nb; cellop_nb.datasets.load({str(place.h5ad)!r})"
        ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    raise co.errors.DataError(ended.stderr.strip().splitlines()[-1].partition(": ")[2])


# -- the same, with a file and the command line


def run_on(place, adata):
    path = place.folder / "odd.h5ad"
    adata.write_h5ad(path)
    place.keep(path)
    return command(place, "run", "--data", "odd.h5ad")


@case(COMMANDS, "guides among the genes of the file", code=2)
def _(place):
    place.adata.var["feature_types"] = ["Gene Expression"] * 38 + ["CRISPR Guide Capture"] * 2
    return run_on(place, place.adata)


@case(COMMANDS, "nothing but controls in the file", code=2)
def _(place):
    return run_on(place, place.adata[place.adata.obs["perturbation"] == "control"].copy())


@case(COMMANDS, "a matrix stored by genes, with fractions", code=2)
def _(place):
    place.adata.X = sparse.csc_matrix(place.adata.X.toarray() * 0.5)
    return run_on(place, place.adata)
