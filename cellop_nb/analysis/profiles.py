"""How alike conditions are: their coefficients on the shared response axes, and the angles between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from ..models.operators import Condition, OperatorModel


def response_profiles(
    operators: OperatorModel, conditions: Sequence[Condition | str] | None = None
) -> pd.DataFrame:
    r"""Coefficients of conditions on orthonormal axes that span what the model's own axes span.

    The model's axes are known only up to an invertible mixture, and so are its coefficients
    :math:`\alpha, \beta`. With the QR decompositions of the axes, :math:`[u_k] = Q R` for the shifts and the same
    for the flattened matrices :math:`U_k V_k^\top`, the coefficients :math:`R\beta` and :math:`R\alpha` have
    lengths and angles that no mixture changes.

    Parameters
    ----------
    operators
        Fitted operators.
    conditions
        Conditions or labels (``"A"``, ``"A+B"``), a context's own part left aside; every perturbation and every
        measured pair where None.

    Returns
    -------
    DataFrame
        A row per condition: ``alpha_1 ...`` (matrix part) and ``beta_1 ...`` (shift part).

    References
    ----------
    Golub and Van Loan 2013, Matrix Computations, section 5.2 (QR).
    """
    encoder = operators.conditions
    if conditions is None:
        conditions = [*encoder.perturbations, *("+".join(pair) for pair in encoder.pairs)]
    asked = [Condition.parse(c) if isinstance(c, str) else c for c in conditions]
    with torch.no_grad():
        alpha, beta = encoder(encoder.design(asked))
        matrices = (operators.axis_left @ operators.axis_right.mT).flatten(1)
        parts = [
            (coefficients @ torch.linalg.qr(axes.T)[1].T).double().cpu().numpy()
            for coefficients, axes in ((alpha, matrices), (beta, operators.axis_shift))
        ]
    names = [
        f"{kind}_{k + 1}"
        for kind, part in zip(("alpha", "beta"), parts, strict=True)
        for k in range(part.shape[1])
    ]
    return pd.DataFrame(np.concatenate(parts, axis=1), index=[str(c) for c in asked], columns=names)


def response_similarity(
    operators: OperatorModel,
    conditions: Sequence[Condition | str] | None = None,
    *,
    part: str = "both",
    cell_norm: float | None = None,
) -> pd.DataFrame:
    r"""Cosine of the angle between the responses of conditions: 1 alike, 0 unrelated, -1 opposite.

    Parameters
    ----------
    operators, conditions
        As in :func:`response_profiles`.
    part
        ``"shift"``, ``"matrix"``, or ``"both"``, where the matrix part is weighed by the root mean square of a
        latent coordinate, so that both are displacements of a typical cell.
    cell_norm
        That weight; 1 (a standard normal latent) where None.

    Returns
    -------
    DataFrame
        (condition, condition), symmetric with ones on the diagonal; NaN for a condition without a response.
    """
    profiles = response_profiles(operators, conditions)
    weight = {"both": cell_norm or 1.0, "matrix": 1.0, "shift": 0.0}[part]
    is_matrix = profiles.columns.str.startswith("alpha")
    values = profiles.to_numpy() * np.where(is_matrix, weight, 0.0 if part == "matrix" else 1.0)
    size = np.linalg.norm(values, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(size > 1e-9, values / size, np.nan)
    return pd.DataFrame(unit @ unit.T, index=profiles.index, columns=profiles.index)
