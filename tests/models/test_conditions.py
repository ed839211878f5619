"""Conditions: reading labels, and coefficients that never fall back to a wrong name."""

from __future__ import annotations

import pytest
import torch

from cellop_nb.errors import LabelError, ModelError
from cellop_nb.models.conditions import Condition, ConditionEncoder

NAMES, CONTEXTS = ["IFNb", "TNF", "IL6"], ["B", "T"]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    made = ConditionEncoder(NAMES, CONTEXTS, 2, pairs=[("TNF", "IFNb")])
    with torch.no_grad():
        made.interaction.normal_()
        made.modulation.normal_()
        made.to_alpha.normal_()
    return made


def beta(encoder, *conditions):
    return encoder(encoder.design(conditions))[1]


# -- labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "parts"), [("IFNb", ("IFNb",)), ("IFNb+TNF", ("IFNb", "TNF")), ("control", ())]
)
def test_parse_reads_single_combination_and_control(label, parts):
    condition = Condition.parse(label, "B", dose=0.5)
    assert condition.perturbations == parts
    assert condition.doses == (0.5,) * len(parts)


def test_parse_knows_another_control_label():
    assert Condition.parse("DMSO", control="DMSO").perturbations == ()
    assert Condition.parse("control", control="DMSO").perturbations == ("control",)


def test_labels_are_readable():
    assert str(Condition(("IFNb", "TNF"), "B")) == "B, IFNb+TNF"
    assert str(Condition(("IFNb",), doses=(0.5,))) == "IFNb (dose 0.5)"
    assert str(Condition((), "B")) == "B, control"


def test_a_dose_for_each_part_is_demanded():
    with pytest.raises(ModelError, match="one dose for each of 2.*Found 1 doses"):
        Condition(("IFNb", "TNF"), doses=(1.0,))


# -- design ----------------------------------------------------------------------------------------------


def test_design_is_doses_contexts_pairs_and_strength(encoder):
    design = encoder.design(
        [Condition(("TNF", "IFNb"), "T", (2.0, 0.5)), Condition(("IL6",)), Condition((), "B")]
    )
    assert design.doses.tolist() == [[0.5, 2, 0], [0, 0, 1], [0, 0, 0]]
    assert design.contexts.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert design.pairs.tolist() == [[1], [0], [0]]
    assert design.strength.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(("IFNB",)), "a perturbation the model was fitted with.*'IFNB'.*did you mean 'IFNb'"),
        (Condition(("IFNb", "TFN")), "'TFN'.*did you mean 'TNF'"),
        (
            Condition(("IFNb",), "monocyte"),
            "a context the model was fitted with.*'monocyte'.*known: 'B', 'T'",
        ),
    ],
)
def test_unknown_labels_are_refused_with_a_suggestion(encoder, condition, message):
    with pytest.raises(LabelError, match=message):
        encoder.design([condition])


# -- coefficients ----------------------------------------------------------------------------------------


def test_control_has_no_coefficients(encoder):
    design = encoder.design([Condition((), "B"), Condition(())])
    assert not torch.stack(encoder(design)).any()


def test_coefficients_follow_the_equation(encoder):
    condition = Condition(("IFNb", "TNF"), "T", (0.5, 3.0))
    alpha, h = encoder(encoder.design([condition]))
    e = encoder.embedding
    expected = (0.5 * e[0] + 3 * e[1] + 0.5 * 3 * encoder.interaction[0]) * (1 + encoder.modulation[1])
    torch.testing.assert_close(h[0], expected)
    torch.testing.assert_close(alpha[0], encoder.to_alpha @ expected)


def test_the_order_of_a_combination_does_not_matter(encoder):
    there, back = Condition(("IFNb", "TNF"), "B"), Condition(("TNF", "IFNb"), "B")
    assert torch.equal(beta(encoder, there), beta(encoder, back))


def test_a_pair_that_was_not_measured_is_additive(encoder):
    a, b, both = (beta(encoder, Condition(p)) for p in [("IFNb",), ("IL6",), ("IFNb", "IL6")])
    torch.testing.assert_close(both, a + b)
    measured = beta(encoder, Condition(("IFNb", "TNF")))
    assert not torch.allclose(measured, a + beta(encoder, Condition(("TNF",))))


def test_without_a_context_nothing_is_modulated(encoder):
    torch.testing.assert_close(beta(encoder, Condition(("TNF",)))[0], encoder.embedding[1])


def test_features_give_coefficients_to_what_was_never_measured():
    features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, 0]])
    encoder = ConditionEncoder(["A", "B", "C", "new"], [], 2, features=features)
    a, b, new = (beta(encoder, Condition((name,))) for name in ("A", "B", "new"))
    torch.testing.assert_close(new, a + 2 * b)
    assert encoder.embedding.shape == (3, 2)


def test_a_pair_of_an_unknown_perturbation_is_refused():
    with pytest.raises(LabelError, match="'IFNB'.*did you mean 'IFNb'"):
        ConditionEncoder(NAMES, CONTEXTS, 2, pairs=[("IFNB", "TNF")])


def test_features_of_the_wrong_length_are_refused():
    with pytest.raises(ModelError, match="3 perturbations.*Found.*2"):
        ConditionEncoder(NAMES, CONTEXTS, 2, features=torch.ones(2, 4))


def test_repr_counts_what_is_known(encoder):
    assert "3 perturbations, 2 contexts, 1 measured pairs -> 2 axes" in repr(encoder)
