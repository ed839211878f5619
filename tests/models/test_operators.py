"""The operator family: identity at the start, control always the identity, a start by moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from cellop_nb.errors import LabelError, ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.operators import (
    Condition,
    ConditionEncoder,
    OperatorModel,
    _largest_of_noise,
    gaussian_map,
    norm_bound,
    spectral_excess,
)

D, NAMES, CONTEXTS = 4, ["A", "B", "C"], ["x", "y"]
some = settings(deadline=None, max_examples=20)

FORMS = {
    "pure shift": {"rank": 0},
    "low rank": {"rank": 1, "n_axes": 2},
    "full": {},
    "more axes than perturbations": {"n_axes": 5},
    "with context parts": {"rank": 2, "context_rank": 1},
    "with pairs": {"pairs": [("A", "B")]},
    "no context parts": {"context_rank": None},
    "no contexts": {"contexts": []},
}


def family(**sizes):
    return OperatorModel(D, NAMES, sizes.pop("contexts", CONTEXTS), **sizes)


def conditions_of(model):
    contexts = [None, *model.config["contexts"]]
    labels = [(name,) for name in NAMES] + [("A", "B")]
    return [Condition(label, context) for label in labels for context in contexts]


def scatter(model, seed=0, size=0.3):
    """Random parameters, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        model.center.copy_(torch.randn(D, generator=generator))
    return model


def cloud(n=40, seed=0, d=D):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return torch.as_tensor(z, dtype=torch.float64)


def tight(cells):
    """Cells so near their mean that it has no noise."""
    return cells.mean(0) + 1e-5 * (cells - cells.mean(0))


@pytest.fixture(params=FORMS, ids=FORMS)
def form(request):
    return family(**FORMS[request.param])


# -- what it means to be an operator form ----------------------------------------------------------------


def test_form_starts_at_the_identity(form):
    for condition in conditions_of(form):
        assert torch.equal(form.operator(condition).matrix, torch.eye(D))
        assert torch.equal(form.operator(condition).shift, torch.zeros(D))


def test_form_gives_gradients_to_its_axes_at_the_identity(form):
    matrices, shifts = form.affine(form.conditions.design(conditions_of(form)))
    z = torch.randn(len(matrices), D)
    ((z.unsqueeze(1) @ matrices.mT).square().sum() + (shifts - z).square().sum()).backward()
    assert form.axis_shift.grad.any(-1).all()
    assert form.axis_left.numel() == 0 or form.axis_left.grad.flatten(1).any(-1).all()


def test_form_gives_gradients_to_every_parameter_once_it_left_the_identity(form):
    matrices, shifts = scatter(form).affine(form.conditions.design(conditions_of(form)))
    (matrices.sin().sum() + shifts.sin().sum()).backward()
    learning = [(name, p) for name, p in form.named_parameters() if p.numel() and p.requires_grad]
    dead = [name for name, p in learning if not p.grad.any()]
    # Pure shifts have no matrices for alpha to weigh.
    assert dead == ([] if form.config["rank"] else ["conditions.to_alpha"])


@pytest.mark.parametrize("seed", range(3))
def test_control_is_exactly_the_identity_in_every_form(form, seed):
    scatter(form, seed)
    for context in [None, *form.config["contexts"]]:
        assert torch.equal(form.operator(Condition((), context)).matrix, torch.eye(D))
        assert torch.equal(form.operator(Condition((), context)).shift, torch.zeros(D))


def test_form_says_one_thing_by_object_and_by_batch(form):
    scatter(form)
    conditions = conditions_of(form)
    matrices, shifts = form.affine(form.conditions.design(conditions))
    for row, condition in enumerate(conditions):
        operator = form.operator(condition)
        assert isinstance(operator, AffineOperator)
        torch.testing.assert_close(operator.matrix, matrices[row])
        torch.testing.assert_close(form.operator(condition).matrix, matrices[row])
        torch.testing.assert_close(form.operator(condition).shift, shifts[row])
        norm = np.linalg.norm(matrices[row].detach().numpy(), 2)
        assert form.operator(condition).norm == pytest.approx(norm, rel=1e-5)


def test_form_moves_equal_and_ragged_groups_alike(form):
    matrices, shifts = scatter(form).affine(form.conditions.design(conditions_of(form)[:3]))
    z = torch.randn(15, D)
    equal = form(z, [5, 5, 5], matrices, shifts)
    ragged = form(torch.cat([z[:5], z[5:10], z[10:], z[10:12]]), [5, 5, 7], matrices, shifts)
    torch.testing.assert_close(ragged[:15], equal)
    expected = [matrices[i] @ z[j] + shifts[i] for i in range(3) for j in range(5 * i, 5 * i + 5)]
    torch.testing.assert_close(equal, torch.stack(expected))


def test_form_refuses_unknown_labels(form):
    with pytest.raises(LabelError, match="'a'.*did you mean 'A'"):
        form.operator(Condition(("a",)))
    with pytest.raises(LabelError, match="a context the model was fitted with"):
        form.operator(Condition(("A",), "z"))


def test_form_is_rebuilt_from_its_config(form):
    scatter(form)
    again = OperatorModel(**form.config)
    again.load_state_dict(form.state_dict())
    for condition in conditions_of(form):
        assert torch.equal(again.operator(condition).matrix, form.operator(condition).matrix)
        assert torch.equal(again.operator(condition).shift, form.operator(condition).shift)


@pytest.mark.parametrize("name", sorted(set(FORMS) - {"low rank"}))
def test_form_with_an_axis_for_each_perturbation_starts_at_the_group_means(name):
    model = family(**FORMS[name]).double()
    control, perturbed = tight(cloud(50)), [tight(cloud(60, seed=k + 1)) for k in range(3)]
    conditions = [Condition((name,), next(iter(model.config["contexts"]), None)) for name in NAMES]
    model.start_from(conditions, [control] * 3, perturbed)
    for condition, target in zip(conditions, perturbed, strict=True):
        torch.testing.assert_close(model.operator(condition)(control).mean(0), target.mean(0))


# -- the equation ----------------------------------------------------------------------------------------


def test_the_family_follows_its_equation():
    model = scatter(family(rank=2, context_rank=1))
    condition = Condition(("A", "C"), "y", (0.5, 2.0))
    alpha, beta = (part[0] for part in model.conditions(model.conditions.design([condition])))
    departure = 2.0 * model.context_left[1] @ model.context_right[1].T
    for k in range(model.config["n_axes"]):
        departure = departure + alpha[k] * model.axis_left[k] @ model.axis_right[k].T
    shift = 2.0 * model.context_shift[1] + beta @ model.axis_shift - departure @ model.center
    torch.testing.assert_close(model.operator(condition).matrix, (torch.eye(D) + departure).detach())
    torch.testing.assert_close(model.operator(condition).shift, shift.detach())


def test_without_a_context_the_shared_part_alone_acts():
    model = scatter(family(context_rank=1))
    shared = model.operator(Condition(("A",)))
    with torch.no_grad():
        for part in (model.context_shift, model.context_left, model.conditions.modulation):
            part.zero_()
    for context in CONTEXTS:
        torch.testing.assert_close(model.operator(Condition(("A",), context)).matrix, shared.matrix)
        torch.testing.assert_close(model.operator(Condition(("A",), context)).shift, shared.shift)


def test_combinations_are_additive_but_for_the_measured_pairs():
    model = scatter(family(pairs=[("B", "A")]))
    a, b, c = (model.operator(Condition((name,))).matrix - torch.eye(D) for name in NAMES)
    torch.testing.assert_close(model.operator(Condition(("B", "C"))).matrix - torch.eye(D), b + c)
    assert not torch.allclose(model.operator(Condition(("A", "B"))).matrix - torch.eye(D), a + b, atol=1e-3)


def test_rank_and_axes_have_sane_defaults():
    assert family().config["n_axes"] == 3
    assert OperatorModel(D, [f"p{k}" for k in range(20)], []).config["n_axes"] == 8
    assert family(rank=99).config["rank"] == D
    assert f"d={D}, 3 axes of rank {D}" in repr(family())


def test_a_family_without_perturbations_is_refused():
    with pytest.raises(ModelError, match="at least one perturbation"):
        OperatorModel(D, [], CONTEXTS)


# -- the start -------------------------------------------------------------------------------------------


def test_start_of_several_contexts_matches_shared_responses():
    """The same affine response in two contexts whose controls differ: every mean is matched."""
    matrix = torch.diag(torch.tensor([1.5, 1.0, 0.5, 1.0], dtype=torch.float64))
    controls = {"x": cloud(4000, seed=1), "y": cloud(4000, seed=1) + 1.0}
    model = family().double()
    conditions = [Condition((name,), context) for name in NAMES for context in CONTEXTS]
    moved = [
        controls[c.context] @ torch.linalg.matrix_power(matrix, NAMES.index(c.perturbations[0])) + 1.0
        for c in conditions
    ]
    model.start_from(conditions, [controls[c.context] for c in conditions], moved)
    for condition, target in zip(conditions, moved, strict=True):
        predicted = model.operator(condition)(controls[condition.context]).mean(0)
        # The covariances are shrunk, so that the matrix is not exact; the contexts' mean shift is.
        torch.testing.assert_close(predicted, target.mean(0), atol=0.15, rtol=0.05)


@pytest.mark.parametrize(("n_perturbations", "n_axes"), [(6, 6), (2, 4)])
def test_start_leaves_no_axis_dead(n_perturbations, n_axes):
    """More axes than latent directions, or than perturbations: all of them can still learn."""
    names, control = [f"p{k}" for k in range(n_perturbations)], tight(cloud(30, d=2))
    model = OperatorModel(2, names, [], n_axes=n_axes).double()
    conditions = [Condition((name,)) for name in names]
    perturbed = [tight(cloud(30, seed=k + 1, d=2)) for k in range(n_perturbations)]
    model.start_from(conditions, [control] * n_perturbations, perturbed)
    for condition, target in zip(conditions, perturbed, strict=True):
        torch.testing.assert_close(model.operator(condition)(control).mean(0), target.mean(0))
    matrices, shifts = model.affine(model.conditions.design(conditions))
    (matrices.sin().sum() + shifts.sin().sum()).backward()
    assert model.axis_left.grad.flatten(1).any(-1).all()
    assert model.axis_shift.grad.any(-1).all()


def test_start_ignores_the_matrix_where_cells_are_few():
    model = family().double()
    few = [cloud(2 * D, seed=k) for k in range(4)]
    model.start_from([Condition((name,)) for name in NAMES], [few[3]] * 3, few[:3])
    assert torch.equal(model.operator(Condition(("A",))).matrix, torch.eye(D, dtype=torch.float64))


def test_a_second_start_forgets_the_first():
    conditions, controls = [Condition((name,)) for name in NAMES], [cloud(50)] * 3
    fresh, used = family().double(), scatter(family().double())
    perturbed = [cloud(60, seed=k + 1) for k in range(3)]
    for model in (fresh, used):
        model.start_from(conditions, controls, perturbed)
    torch.testing.assert_close(used.operator(conditions[0]).matrix, fresh.operator(conditions[0]).matrix)
    torch.testing.assert_close(used.operator(conditions[0]).shift, fresh.operator(conditions[0]).shift)


@some
@given(st.integers(0, 2**31))
def test_gaussian_map_carries_one_covariance_to_the_other(seed):
    x, y = cloud(30, seed), cloud(30, seed + 1)
    matrix = gaussian_map(x, y, shrink=0.0)
    torch.testing.assert_close(matrix @ torch.cov(x.T) @ matrix.T, torch.cov(y.T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-6, atol=1e-6)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()


def test_gaussian_map_equals_scipys_formula():
    x, y = cloud(30, 1), cloud(30, 2)
    s0, s1 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = sqrtm(s0)
    expected = np.linalg.inv(root) @ sqrtm(root @ s1 @ root) @ np.linalg.inv(root)
    np.testing.assert_allclose(gaussian_map(x, y, shrink=0.0), expected, rtol=1e-5, atol=1e-6)


def test_gaussian_map_recovers_a_planted_symmetric_map():
    root = cloud(9, 5)[:D, :D]
    planted = torch.eye(D).double() + 0.1 * root @ root.T
    x = cloud(50, 3)
    torch.testing.assert_close(gaussian_map(x, x @ planted + 2.0, shrink=0.0), planted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3])
def test_gaussian_map_does_not_depend_on_the_unit(size, dtype):
    x, y = cloud(30, 1).to(dtype), cloud(30, 2).to(dtype)
    torch.testing.assert_close(gaussian_map(size * x, size * y), gaussian_map(x, y), rtol=1e-3, atol=1e-4)


def test_gaussian_map_of_cells_that_do_not_differ():
    one_point, y = torch.ones(30, D), cloud(30, 2).float()
    assert torch.equal(gaussian_map(one_point, y), torch.eye(D))
    assert not gaussian_map(y, one_point).any()


def test_gaussian_map_of_a_cloud_to_itself_is_the_identity():
    x = cloud(50)
    torch.testing.assert_close(gaussian_map(x, x + 3), torch.eye(D).double(), atol=1e-7, rtol=0)


# -- penalties -------------------------------------------------------------------------------------------


@some
@given(st.integers(0, 2**31), st.floats(0, 3), st.floats(1.0, 4.0))
def test_spectral_excess_is_that_of_a_plain_svd(seed, size, max_norm):
    """Also where the bound lets the decomposition be left out: the value never changes."""
    rng = np.random.default_rng(seed)
    matrices = np.eye(D) + size * rng.normal(size=(5, D, D)) / D
    norms = np.linalg.svd(matrices, compute_uv=False)[:, 0]
    expected = np.mean(np.maximum(norms - max_norm, 0) ** 2)
    assert spectral_excess(torch.as_tensor(matrices), max_norm).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(300, 8), (60, 32), (20, 40)])
def test_noise_reaches_its_largest_eigenvalue_once_in_twenty(n, d):
    rng = np.random.default_rng(0)
    largest = [np.linalg.norm(rng.normal(size=(n, d)), 2) ** 2 for _ in range(400)]
    assert _largest_of_noise(n, d) == pytest.approx(np.quantile(largest, 0.95), rel=0.05)


@some
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_norm_bound_is_above_and_close(seed, size):
    matrices = torch.as_tensor(size * np.random.default_rng(seed).normal(size=(4, D, D)))
    norms, bound = torch.linalg.matrix_norm(matrices, 2), norm_bound(matrices)
    assert (bound >= norms * (1 - 1e-9)).all() and (bound <= D ** (1 / 16) * norms * (1 + 1e-9)).all()


def test_spectral_excess_pushes_a_large_operator_down():
    matrices = (3 * torch.eye(2))[None].requires_grad_()
    spectral_excess(matrices, 2.0).backward()
    assert (matrices.grad[0].diagonal() >= 0).all()
    assert matrices.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spectral_excess_shows_a_matrix_that_is_not_finite(value):
    """The guard can only name what it gets to see: no error of the decomposition, but NaN."""
    assert not spectral_excess(torch.full((2, D, D), value), 3.0).isfinite()


def test_ridges_measure_the_departure_from_the_identity():
    model = scatter(family(context_rank=1))
    matrices, _ = model.affine(model.conditions.design([Condition(("A",)), Condition(("B",), "x")]))
    naive = np.mean([np.linalg.norm(m - np.eye(D)) ** 2 for m in matrices.detach().numpy()])
    assert model.ridge(matrices).item() == pytest.approx(naive, rel=1e-5)
    names = ("context_left", "context_right", "context_shift")
    parts = [getattr(model, name).detach().numpy() for name in names]
    own = [np.linalg.norm(u @ v.T) ** 2 + np.linalg.norm(b) ** 2 for u, v, b in zip(*parts, strict=True)]
    own += np.square(model.conditions.modulation.detach().numpy()).sum(1)
    assert model.context_ridge().item() == pytest.approx(np.mean(own), rel=1e-5)
    assert family().ridge(torch.eye(D)[None]).item() == 0


# -- conditions ------------------------------------------------------------------------------------------


CYTOKINES, CELL_TYPES = ["IFNb", "TNF", "IL6"], ["B", "T"]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    made = ConditionEncoder(CYTOKINES, CELL_TYPES, 2, pairs=[("TNF", "IFNb")])
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
    condition = Condition.parse(label, "B", dose=0.5, perturbations=["IFNb", "TNF"])
    assert condition.perturbations == parts
    assert condition.doses == (0.5,) * len(parts)


def test_parse_splits_at_a_plus_between_perturbations_alone():
    names = ["(+)-JQ1", "anti-CD3+CD28", "TNF"]
    assert Condition.parse("(+)-JQ1", perturbations=names).perturbations == ("(+)-JQ1",)
    assert Condition.parse("anti-CD3+CD28", perturbations=names).perturbations == ("anti-CD3+CD28",)
    assert Condition.parse("anti-CD3+CD28+TNF", perturbations=names).perturbations == ("anti-CD3+CD28", "TNF")


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
    assert design.sums(torch.eye(3)).tolist() == [[0.5, 2, 0], [0, 0, 1], [0, 0, 0]]
    assert design.contexts.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert (design.pairs.tolist(), design.products.tolist()) == ([[0], [0], [0]], [[1], [0], [0]])
    assert design.strength.tolist() == [2, 1, 0]
    shared = Condition(("IL6",), like=(("T", 0.25), ("B", 0.75)))
    assert encoder.design([shared]).contexts.tolist() == [[0.75, 0.25]]


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


def test_a_pair_of_an_unknown_perturbation_is_refused():
    with pytest.raises(LabelError, match="'IFNB'.*did you mean 'IFNb'"):
        ConditionEncoder(CYTOKINES, CELL_TYPES, 2, pairs=[("IFNB", "TNF")])


def test_repr_counts_what_is_known(encoder):
    assert "3 perturbations, 2 contexts, 1 measured pair -> 2 axes" in repr(encoder)
