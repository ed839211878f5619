"""Perturbations whose names have a plus, from the data through a fitted predictor to virtual cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellop_nb.analysis.cellop import CellOp
from cellop_nb.data.contract import setup
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import LabelError

NAMES = {"drug 1": "(+)-JQ1", "drug 2": "anti-CD3+CD28", "drug 1+drug 2": "(+)-JQ1+anti-CD3+CD28"}


@pytest.fixture(scope="module")
def model():
    adata = synthetic(
        n_contexts=2,
        n_perturbations=2,
        combinations=1,
        n_cells=40,
        n_genes=40,
        n_latent=4,
        library=80.0,
        seed=2,
    )
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace(NAMES)
    setup(adata)
    model = CellOp(adata, n_latent=4)
    model.recipe = replace(
        model.recipe, vae_epochs=2, finish_epochs=1, operator_epochs=1, n_folds=2, n_hidden=8
    )
    return model.fit(progress=False)


def test_a_name_with_a_plus_is_one_perturbation(model):
    assert model.perturbations == ["(+)-JQ1", "anti-CD3+CD28"]
    cells = model.predict(context="type A", perturbation="anti-CD3+CD28", n_cells=5)
    assert (
        set(cells.obs["perturbation"]) == {"anti-CD3+CD28"} and np.isfinite(cells.layers["mean"].data).all()
    )


def test_combinations_of_such_names_are_asked_for_as_measured(model):
    operator = model.operator("type A", "(+)-JQ1+anti-CD3+CD28")
    parts = [model.operator("type A", name) for name in model.perturbations]
    assert all(not np.allclose(operator.shift, part.shift) for part in parts)
    assert model.predict(context="type B", perturbation="(+)-JQ1+anti-CD3+CD28", n_cells=4).n_obs == 4


def test_what_was_never_measured_is_named_whole(model):
    with pytest.raises(LabelError, match=r"Found '\(\+\)-JQ1\+anti-CD4'"):
        model.predict(context="type A", perturbation="(+)-JQ1+anti-CD4")
    with pytest.raises(LabelError, match=r"Found 'anti-CD3\+CD29'"):
        model.predict(context="type A", perturbation="anti-CD3+CD29")
