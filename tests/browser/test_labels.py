"""Labels from data in JupyterLab itself: markup in an `obs` value shows as text, and runs nothing."""

from __future__ import annotations

import nbformat
import pytest

from .lab import NotebookPage

pytestmark = [pytest.mark.browser, pytest.mark.timeout(360, method="thread")]

EVIL = "<script>window.ran = 'script'</script><img src=x onerror=\"window.ran = 'image'\">"

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}  # or JupyterLab asks for one

SCREEN = f"""\
import cellop_nb as co
from cellop_nb.display import markdown, styled

adata = co.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=30, n_genes=20, library=200.0)
for key, old in (("perturbation", "drug 1"), ("cell_type", "type A")):
    adata.obs[key] = adata.obs[key].astype(str).replace({{old: {EVIL!r}}})
co.split(adata)
vae = co.new_vae(adata, n_latent=2)
co.embed(adata, vae)
operators = co.new_operators(adata)"""

VIEWS = {
    "table": "co.setup(adata)",
    "styled": "styled(co.setup(adata), precision=1)",
    "groups": "co.Groups(adata, use_rep='X_nbvae')",
    "sentence": f"markdown('**' + {EVIL!r} + '** is at its floor')",
    "model": "operators",
    "explorer": "co.Explorer(co.CellOp(adata, n_genes=None, vae=vae, operators=operators).fit(progress=False))",
}


def test_markup_in_labels_shows_as_text(desk):
    lab, browser = desk
    sources = [SCREEN, *VIEWS.values(), f"from IPython.display import HTML\nHTML({EVIL!r})"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    for name, part in (("labels", cells[:-1]), ("proof", cells[-1:])):
        book = nbformat.v4.new_notebook(cells=part, metadata={"kernelspec": KERNEL})
        nbformat.write(book, lab.root / f"{name}.ipynb")
    with NotebookPage(browser, lab.url("labels.ipynb")) as notebook:
        notebook.run_all()
        notebook.wait_until_run(120)
        notebook.said("real cells|prediction")  # the explorer has drawn
        outputs = notebook.page.locator(".jp-CodeCell .jp-OutputArea")
        for place, name in enumerate(VIEWS, start=1):
            text = outputs.nth(place).inner_text()
            assert "<script>window.ran" in text or name == "explorer", name
        assert notebook.page.evaluate("() => window.ran") is None
        assert notebook.errors_in_cells() == []
    with NotebookPage(browser, lab.url("proof.ipynb")) as notebook:
        notebook.run_all()
        notebook.page.wait_for_function("() => window.ran", timeout=60_000)  # what is shown as HTML does run
