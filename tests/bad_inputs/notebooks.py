"""Parameters of notebooks, and the command line."""

from __future__ import annotations

from .cases import COMMANDS, NOTEBOOKS, case, command, refuses

# -- notebook parameters


def validated(notebook: str, **values):
    from cellop_nb.notebook import parameters

    return parameters.validate(notebook, values)


@case(NOTEBOOKS, "an unknown parameter")
def _(place):
    validated("02_train_vae", n_latent=16)


@case(NOTEBOOKS, "text where a number is due")
def _(place):
    validated("02_train_vae", latent_dim="16")


@case(NOTEBOOKS, "a number out of range")
def _(place):
    validated("02_train_vae", latent_dim=0)


@case(NOTEBOOKS, "a rate that is not finite")
def _(place):
    validated("02_train_vae", learning_rate=float("nan"))


@case(NOTEBOOKS, "a notebook that does not exist")
def _(place):
    validated("12_nothing", seed=1)


# -- command line


@case(COMMANDS, "an unknown command", code=2)
def _(place):
    return command(place, "rnu")


@case(COMMANDS, "an unknown option", code=2)
def _(place):
    return command(place, "run", "--dat", "screen.h5ad")


@case(COMMANDS, "a file that is not there", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "run", "--data", "scren.h5ad")


@case(COMMANDS, "log-normalised values in a file whose counts are in raw", code=2)
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = place.adata.X.log1p()
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "the wrong column", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad", "--context-key", "celltype")


@case(COMMANDS, "the wrong column of a zarr", code=2, found="no such column")
def _(place):
    place.adata.write_zarr(place.folder / "screen.zarr")
    for path in (place.folder / "screen.zarr").rglob("*"):
        _ = place.keep(path) if path.is_file() else path
    return command(place, "run", "--data", "screen.zarr", "--context-key", "celltype")


@case(COMMANDS, "log-normalised counts in the file", code=2)
def _(place):
    place.adata.X = place.adata.X.log1p()
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "a file that was cut short", code=2)
def _(place):
    place.cut(place.h5ad, 0.3)
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "a parameter out of range", code=2)
def _(place):
    return command(place, "run", "--only", "02", "-p", "latent_dim", "0")


@case(COMMANDS, "a parameter that no notebook has", code=2)
def _(place):
    return command(place, "run", "--only", "02", "-p", "latent_dims", "8")


@case(COMMANDS, "a run folder outside of the runs", code=2)
def _(place):
    return command(place, "run", "--name", "../elsewhere")


@case(COMMANDS, "broken YAML", code=2)
def _(place):
    place.put("values.yaml", "latent_dim: [8\n")
    return command(place, "run", "--only", "02", "-f", "values.yaml")


@case(COMMANDS, "a folder without notebooks", code=2)
def _(place):
    return command(place, "run", "--notebooks", ".")


@case(COMMANDS, "a parent of runs that is a file", code=1)
def _(place):
    refuses(place, "runs")
    return command(place, "run", "--only", "00", "--runs", "runs")


@case(COMMANDS, "notebooks copied twice", code=2)
def _(place):
    place.put("mine/notebooks/00_quickstart.ipynb", "{}")
    return command(place, "notebooks", "mine")
