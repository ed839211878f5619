"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cellop_nb

from . import families

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the project."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_tests():
    """A kernel or worker left behind would hold the pipe that the tests' output goes to, and its reader wait."""
    with families.family():
        yield


@pytest.fixture(scope="session")
def call():
    """`call(command, seconds=300, **surroundings)`: a command run to its end, or ended with all it started."""
    return families.call


@pytest.fixture
def renamed_screen(tmp_path) -> Path:
    """A small screen as others write one: columns and labels of their own, counts in a layer, logarithms in ``X``."""
    adata = cellop_nb.datasets.synthetic(
        n_contexts=3, n_perturbations=2, n_cells=40, n_genes=60, library=200.0
    )
    adata.obs = adata.obs.rename(columns={"perturbation": "Treatment", "cell_type": "CellType"})
    adata.obs["Treatment"] = adata.obs["Treatment"].astype(str).replace("control", "DMSO")
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.uns.clear()
    adata.write_h5ad(tmp_path / "my screen.h5ad")
    return tmp_path / "my screen.h5ad"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real screens; without one a test is skipped, or fails where there must be one."""
    folder = Path(os.environ.get("CELLOP_REAL_DATA") or ROOT.parent / "shared" / "data")
    if any(folder.glob("*.h5ad")):
        return folder
    reason = f"no real screens (*.h5ad) in {folder}; set CELLOP_REAL_DATA to a folder that has them"
    if os.environ.get("CELLOP_REQUIRE_REAL_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def kang_file(real_data: Path) -> Path:
    """Interferon-stimulated PBMC of Kang et al. 2018."""
    return real_data / "kang18_pbmc_ifnb.h5ad"


@pytest.fixture(scope="session")
def norman_file(real_data: Path) -> Path:
    """CRISPRa singles and doubles in K562 of Norman et al. 2019."""
    return real_data / "norman19_k562_subset.h5ad"


@pytest.fixture(scope="session")
def mcfaline_file(real_data: Path) -> Path:
    """Kinase knock-downs in glioma lines of McFaline-Figueroa et al. 2023: nearly no effect."""
    return real_data / "mcfaline23_glioma_subset.h5ad"


@pytest.fixture
def write_notebook():
    """A function that writes a small notebook: `write_notebook(path, parameters_source, *other_sources)`."""
    import nbformat

    def write(path: Path, parameters: str, *sources: str) -> Path:
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        cells = [first, *(nbformat.v4.new_code_cell(source) for source in sources)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        return path

    return write
