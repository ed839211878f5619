"""Public perturbation screens: where they are, whom to cite, how their columns map to ours."""

from __future__ import annotations

from dataclasses import dataclass, field

PERTPY = "https://exampledata.scverse.org/pertpy/{}.h5ad"
SCPERTURB = "https://zenodo.org/records/13350497/files/{}.h5ad"

# our column -> columns that other collections use for it, in order of preference
COLUMNS = {
    "perturbation": ("perturbation_name", "condition", "label"),
    "cell_type": ("celltype", "cell_line", "seurat_annotations"),
    "donor": ("replicate", "patient", "ind"),
    "dose": ("dose_value",),
}


@dataclass(frozen=True)
class Screen:
    """A public screen.

    Attributes
    ----------
    cells
        About how many; 0 where the source does not say.
    columns
        Our column to theirs, where the general table `COLUMNS` would choose another.
    control
        Their labels of control cells, written "control" on loading.
    joiner
        What separates the parts of a combination, written "+" on loading.
    """

    name: str
    title: str
    citation: str
    url: str
    cells: int = 0
    licence: str = "none stated; see the publication"
    columns: dict[str, str] = field(default_factory=dict)
    control: tuple[str, ...] = ("control",)
    joiner: str = "+"


def _pertpy(name: str, title: str, citation: str, cells: int = 0, **more) -> Screen:
    return Screen(name, title, citation, PERTPY.format(name), cells, **more)


def scperturb(name: str, title: str = "", citation: str = "", cells: int = 0, joiner: str = "+") -> Screen:
    """A file of the scPerturb collection (Peidli et al. 2024)."""
    return Screen(
        f"scperturb/{name}",
        title or name,
        citation or "see Peidli et al., Nat. Methods 21:531 (2024)",
        SCPERTURB.format(name),
        cells,
        licence="see the Zenodo record",
        joiner=joiner,
    )


SCREENS = (
    _pertpy(
        "kang_2018",
        "PBMC of 8 lupus patients, 6 h with or without interferon beta",
        "Kang et al., Nat. Biotechnol. 36:89 (2018)",
        24_700,
        columns={"perturbation": "label", "donor": "replicate"},
        control=("ctrl", "control"),
    ),
    _pertpy(
        "norman_2019_raw",
        "CRISPRa of single genes and pairs in K562",
        "Norman et al., Science 365:786 (2019)",
        111_000,
    ),
    _pertpy("dixit_2016_raw", "CRISPR knock-outs, Perturb-seq", "Dixit et al., Cell 167:1853 (2016)"),
    _pertpy("adamson_2016_pilot", "CRISPRi pilot in K562", "Adamson et al., Cell 167:1867 (2016)", 5_800),
    _pertpy(
        "adamson_2016_upr_epistasis",
        "CRISPRi of the unfolded protein response, with combinations",
        "Adamson et al., Cell 167:1867 (2016)",
        15_000,
    ),
    _pertpy("datlinger_2017", "CROP-seq in Jurkat", "Datlinger et al., Nat. Methods 14:297 (2017)", 5_900),
    _pertpy(
        "datlinger_2021", "scifi-RNA-seq in Jurkat", "Datlinger et al., Nat. Methods 18:635 (2021)", 39_200
    ),
    _pertpy(
        "srivatsan_2020_sciplex2",
        "4 drugs and doses in A549",
        "Srivatsan et al., Science 367:45 (2020)",
        24_300,
    ),
    _pertpy(
        "srivatsan_2020_sciplex3",
        "188 drugs, 4 doses, 3 cell lines",
        "Srivatsan et al., Science 367:45 (2020)",
        799_000,
    ),
    _pertpy(
        "mcfarland_2020",
        "Drugs and knock-outs in pools of cancer cell lines",
        "McFarland et al., Nat. Commun. 11:4296 (2020)",
        183_000,
    ),
    _pertpy(
        "replogle_2022_k562_essential",
        "CRISPRi of essential genes in K562",
        "Replogle et al., Cell 185:2559 (2022)",
        310_000,
    ),
    _pertpy(
        "replogle_2022_rpe1",
        "CRISPRi of essential genes in RPE1",
        "Replogle et al., Cell 185:2559 (2022)",
        248_000,
    ),
    _pertpy(
        "frangieh_2021_rna",
        "Knock-outs in melanoma cells under T-cell attack",
        "Frangieh et al., Nat. Genet. 53:332 (2021)",
        218_000,
    ),
    scperturb(
        "NormanWeissman2019_filtered",
        "CRISPRa of single genes and pairs in K562",
        "Norman et al., Science 365:786 (2019)",
        111_000,
        joiner="_",
    ),
)
