"""What the machine lacks."""

from __future__ import annotations

from unittest import mock

from .cases import MACHINE, case, command


@case(MACHINE, "no kernel to run a notebook with")
def _(place):
    from jupyter_client.kernelspec import NoSuchKernel

    from cellop_nb.commands import environment
    from cellop_nb.notebook import runs

    shipped = next(environment.NOTEBOOKS.glob("00_*.ipynb"))
    book = place.put(shipped.name, shipped.read_bytes())
    with mock.patch("papermill.execute_notebook", side_effect=NoSuchKernel("python3")):
        runs.execute(book, place.folder / "run")


def with_version(package: str, found: str):
    """As if another version of a package were installed."""
    from importlib import metadata

    known = metadata.version
    return mock.patch("cellop_nb.packages.version", lambda name: found if name == package else known(name))


@case(MACHINE, "a torch that is too old")
def _(place):
    from cellop_nb import packages

    with with_version("torch", "2.0.1"):
        packages.refuse_outdated()


@case(MACHINE, "an ipykernel that is too old")
def _(place):
    from cellop_nb import packages

    with with_version("ipykernel", "5.5.6"):
        packages.refuse_outdated()


@case(MACHINE, "a package that is missing, in an installed package", code=1)
def _(place):
    from importlib.metadata import PackageNotFoundError, version

    from cellop_nb.commands import environment

    def lacks(name):
        if name == "papermill":
            raise PackageNotFoundError(name)
        return version(name)

    installed = mock.patch.object(environment, "IS_CHECKOUT", False)
    with mock.patch("cellop_nb.packages.version", lacks), installed:
        return command(place, "run", "--only", "00")
