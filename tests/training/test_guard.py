"""The non-finite guard: eight planted faults, rollback, reproducers, and what a healthy step pays."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

from cellop_nb.errors import CellopError
from cellop_nb.training.guard import NonFiniteError, NonFiniteGuard, replay

CELLS, GENES, LATENT = 6, 5, 2


class Toy(nn.Module):
    """A small count VAE without any protection, so that planted faults do their harm."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(GENES, 8), nn.ReLU(), nn.Linear(8, 2 * LATENT))
        self.decoder = nn.Linear(LATENT, GENES)
        self.log_theta = nn.Parameter(torch.zeros(GENES))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)  # a running statistic that looking twice must not move
        mean, logvar = self.encoder(torch.log1p(x)).chunk(2, -1)
        return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


class ToyTrainer:
    """The least that the guard needs to know of a trainer."""

    def __init__(self, *, clip=10.0, calls_begin=True, **guard):
        torch.manual_seed(0)
        self.model = Toy()
        self.generator = torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.guard = NonFiniteGuard(self.model, self.optimizer, **guard)
        self.counts = torch.poisson(torch.full((CELLS, GENES), 3.0), generator=self.generator)
        self.epoch, self.step, self.clip, self.calls_begin = 0, 0, clip, calls_begin
        self.learning_rate = 1e-2
        self.weird_term = lambda value: value * 0
        self.between = {}  # step -> what happens after the optimiser's step

    def loss_terms(self, batch):
        posterior = self.model(batch.counts)
        z = posterior.loc + posterior.scale * torch.randn(posterior.loc.shape, generator=self.generator)
        mu = torch.softmax(self.model.decoder(z), -1) * batch.counts.sum(1, keepdim=True)
        theta = self.model.log_theta.exp()
        x = batch.counts
        nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        nb = nb + theta * torch.log(theta / (theta + mu)) + x * torch.log(mu / (theta + mu))
        kl = 0.5 * (posterior.loc**2 + posterior.scale**2 - 1 - 2 * posterior.scale.log()).sum(1)
        return {"reconstruction": -nb.sum(1).mean(), "kl": kl.mean(), "extra": self.weird_term(kl.mean())}

    def describe_batch(self, batch):
        return {"cells": [f"cell{i}" for i in range(CELLS)], "genes": [f"gene{i}" for i in range(GENES)]}

    def run(self, steps=1):
        for _ in range(steps):
            if self.calls_begin:
                self.guard.begin_step(self)
            self.batch = SimpleNamespace(counts=self.counts.clone(), name="batch")
            self.optimizer.zero_grad()
            self.one_step()
            self.step += 1
        return self

    def one_step(self):
        terms = self.loss_terms(self.batch)
        if not self.guard.before_backward(terms, self):
            return
        sum(terms.values()).backward()
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip) if self.clip else None
        if not self.guard.after_backward(self, norm):
            return
        self.optimizer.step()
        self.between.pop(self.step, lambda: None)()
        self.guard.after_step(self)

    def state(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def fail(trainer, steps=1) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(steps)
    return caught.value


def assert_same(state, expected):
    for name, tensor in expected.items():
        if name != "seen":
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture(params=[False, True], ids=["at once", "deferred"])
def trainer(request, tmp_path):
    """Three healthy steps; `deferred` is the way of a GPU, which works on a CPU as well."""
    return ToyTrainer(deferred=request.param, folder=tmp_path).run(3)


def everything_is_finite(trainer):
    moments = [t for s in trainer.optimizer.state.values() for t in s.values()]
    return all(torch.isfinite(t).all() for t in [*trainer.model.state_dict().values(), *moments])


# -- eight planted faults --------------------------------------------------------------------------


def test_input_counts(trainer):
    before = trainer.state()
    trainer.counts[4, 2] = math.nan
    error = fail(trainer)
    assert (error.stage, error.step, error.origin.kind) == ("loss", 3, "batch")
    assert (error.cells, error.genes, error.module) == (["cell4"], ["gene2"], None)
    assert "batch.counts" in str(error) and "cell4" in str(error) and "gene2" in str(error)
    assert_same(trainer.state(), before)
    assert trainer.guard.last_finite.step == 3


def test_encoder_weight(trainer):
    healthy = trainer.guard.last_finite
    trainer.model.encoder[2].weight.data[1, 3] = math.inf
    error = fail(trainer)
    assert (error.stage, error.step, error.origin.kind) == ("parameter", 2, "parameter")
    assert error.module == "encoder.2" and "encoder.2.weight" in str(error)
    # The present state is poisoned; the one that was kept is put back.
    assert trainer.guard.last_finite is healthy
    assert everything_is_finite(trainer)
    assert_same(trainer.state(), healthy.model)


def test_logvar_of_1e4(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor) == ("loss", "reconstruction")
    assert (error.origin.name, error.module) == ("operation exp", "Toy")
    assert "test_guard.py" in error.origin.line and error.origin.line.endswith("in forward")
    assert error.values["inputs"][0][1] == pytest.approx(5e3, rel=1e-2)
    assert error.cells == [f"cell{i}" for i in range(CELLS)]
    assert_same(trainer.state(), before)
    assert trainer.guard.last_finite.step == 3


def test_theta_to_zero(trainer):
    trainer.model.log_theta.data[3] = -200.0  # exp underflows to 0: lgamma(0) is infinite
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor, error.genes) == ("loss", "reconstruction", ["gene3"])
    assert error.origin.name in ("operation lgamma", "operation log")
    assert error.module is None and error.origin.line.endswith("in loss_terms")
    assert_same(trainer.state(), before)


def test_a_loss_term(trainer):
    trainer.weird_term = lambda value: (value - value.detach()) / 0.0
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor, error.origin.name) == ("loss", "extra", "operation div")
    assert error.module is None and math.isnan(error.values["terms"]["extra"])
    assert math.isfinite(error.values["terms"]["kl"])
    assert_same(trainer.state(), before)


def test_a_gradient_of_an_operation(trainer):
    # sqrt at 0 is finite, its derivative is not: the forward pass shows nothing.
    trainer.weird_term = lambda value: (value - value.detach()).sqrt()
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.origin.kind) == ("gradient", "gradient")
    assert error.origin.name == "gradient of operation Sqrt" and "<lambda>" in error.origin.line
    assert_same(trainer.state(), before)
    assert everything_is_finite(trainer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_of_one_parameter(trainer, value):
    handle = trainer.model.decoder.weight.register_hook(lambda g: g * value)
    before = trainer.state()
    error = fail(trainer)
    # Clipping by a NaN norm has spread it over every gradient; the second run still knows the first one.
    assert (error.stage, error.tensor, error.module) == ("gradient", "decoder.weight", "decoder")
    assert_same(trainer.state(), before)
    handle.remove()
    trainer.run(2)


@pytest.mark.parametrize("check_every", [1, 10])
def test_a_parameter_after_the_step(trainer, check_every):
    trainer.guard.check_every = check_every
    healthy = trainer.guard.last_finite
    trainer.between[3] = lambda: trainer.model.decoder.bias.data[0].fill_(math.nan)
    error = fail(trainer, steps=2)
    assert (error.stage, error.step) == ("parameter", 3)
    assert (error.tensor, error.module) == ("decoder.bias", "decoder")
    assert_same(trainer.state(), healthy.model)
    assert everything_is_finite(trainer)
    trainer.run(2)


def test_an_operator_of_norm_1e20():
    from cellop_nb.models.energy import grouped_energy_distance

    class Operators(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3).repeat(2, 1, 1))

        def forward(self, z):
            return z @ self.matrix.mT

    class OperatorToy(ToyTrainer):
        def __init__(self):
            super().__init__()
            self.model = Operators()
            self.optimizer = torch.optim.Adam(self.model.parameters())
            self.guard = NonFiniteGuard(self.model, self.optimizer)
            self.counts = torch.randn(2, 10, 3, generator=self.generator)

        def loss_terms(self, batch):
            moved, target = self.model(batch.counts), batch.counts + 1
            energy = grouped_energy_distance(moved.flatten(0, 1), target.flatten(0, 1), [10, 10], [10, 10])
            excess = (torch.linalg.matrix_norm(self.model.matrix, 2) - 3).clamp_min(0).square()
            return {"energy": energy.mean(), "stability": excess.mean()}

        def describe_batch(self, batch):
            return {"groups": ["B, IFNb", "NK, IFNb"]}

    trainer = OperatorToy().run(2)
    trainer.model.matrix.data[1] *= 1e20
    before = trainer.state()
    error = fail(trainer)
    assert error.stage == "loss" and error.tensor in ("energy", "stability")
    assert error.groups == ["NK, IFNb"]
    assert error.norms["matrix"] == pytest.approx(3**0.5 * 1e20, rel=0.01)
    assert_same(trainer.state(), before)


# -- after the fault -------------------------------------------------------------------------------


def test_the_reproducer_shows_the_fault_again(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    error = fail(trainer)
    content = torch.load(error.reproducer, weights_only=True)
    assert content["fault"]["step"] == 3
    again = replay(error.reproducer, ToyTrainer())
    assert (again.tensor, again.module, again.origin.line) == (error.tensor, error.module, error.origin.line)
    assert (again.cells, again.step) == (error.cells, error.step)
    assert not list(error.reproducer.parent.glob("*.part"))


def test_a_repaired_model_replays_to_nothing(trainer):
    trainer.weird_term = lambda value: value / 0.0
    error = fail(trainer)
    assert replay(error.reproducer, ToyTrainer()) is None


def test_replay_draws_the_same_noise(tmp_path):
    """A fault of one draw in many is found again, because the random state is part of the file."""

    def rare(trainer):
        def term(value):
            drawn = torch.rand((), generator=trainer.generator)
            return value * torch.where(drawn > 0.97, torch.inf, 0.0)

        return term

    trainer = ToyTrainer(folder=tmp_path)
    trainer.weird_term = rare(trainer)
    error = fail(trainer, steps=2000)
    fresh = ToyTrainer()
    fresh.weird_term = rare(fresh)
    assert replay(error.reproducer, fresh).tensor == "extra"


def test_a_damaged_or_foreign_file_is_refused(trainer, tmp_path):
    trainer.counts[0, 0] = math.nan
    error = fail(trainer)
    with pytest.raises(CellopError, match="model of the reproducer"):
        replay(error.reproducer, model=nn.Linear(2, 2), loss_terms=lambda batch: {})
    broken = tmp_path / "broken.pt"
    broken.write_bytes(error.reproducer.read_bytes()[:200])
    with pytest.raises(CellopError, match="Expected a reproducer"):
        replay(broken, trainer)


def test_looking_again_leaves_no_trace(trainer):
    trainer.weird_term = lambda value: value / 0.0
    seen = float(trainer.model.seen)
    fail(trainer)
    assert float(trainer.model.seen) == seen + CELLS  # the faulty step itself, but not the second look


def test_rollback_halves_the_rate_and_goes_on():
    trainer = ToyTrainer(on_nonfinite="rollback").run(3)
    kept = trainer.guard.last_finite
    trainer.weird_term = lambda value: value / 0.0
    trainer.run(1)
    assert trainer.guard.rollbacks == 1 and trainer.learning_rate == 0.5e-2
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5e-2
    assert_same(trainer.state(), kept.model)
    trainer.weird_term = lambda value: value * 0
    trainer.run(3)
    assert everything_is_finite(trainer)
    with pytest.raises(AssertionError):
        assert_same(trainer.state(), kept.model)


def test_rollback_from_a_poisoned_parameter_and_gradient():
    trainer = ToyTrainer(on_nonfinite="rollback").run(3)
    trainer.between[3] = lambda: trainer.model.decoder.bias.data.fill_(math.nan)
    trainer.run(2)
    assert trainer.guard.rollbacks == 1 and everything_is_finite(trainer)
    handle = trainer.model.decoder.weight.register_hook(lambda g: g * math.nan)
    trainer.run(1)
    handle.remove()
    trainer.run(1)
    assert [error.stage for error in trainer.guard.errors] == ["parameter", "gradient"]
    assert everything_is_finite(trainer)


def test_rollback_is_bounded():
    trainer = ToyTrainer(on_nonfinite="rollback", max_rollbacks=3).run(2)
    trainer.weird_term = lambda value: value / 0.0
    fail(trainer, steps=10)
    assert trainer.guard.rollbacks == 3 and trainer.learning_rate == 1e-2 / 8


def test_nan_in_the_data_is_never_rolled_back():
    trainer = ToyTrainer(on_nonfinite="rollback").run(2)
    trainer.counts[0, 0] = math.nan
    assert fail(trainer).origin.kind == "batch"
    assert trainer.guard.rollbacks == 0


def test_restored_training_repeats_itself_exactly():
    trainer = ToyTrainer().run(4)
    trainer.guard.keep(trainer)
    first = trainer.run(3).state()
    trainer.guard.restore(trainer)
    assert_same(trainer.run(3).state(), first)


# -- what is not a fault ---------------------------------------------------------------------------


def test_a_norm_that_overflows_is_not_a_non_finite_gradient(caplog):
    trainer = ToyTrainer(clip=1.0).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    trainer.run(2)
    assert trainer.guard.overflows == 2 and not trainer.guard.errors
    assert caplog.text.count("overflowed") == 1


def test_but_an_optimiser_that_squares_it_is():
    """Without clipping Adam's second moment overflows, and the parameter would stand still for ever."""
    trainer = ToyTrainer(clip=None).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    error = fail(trainer)
    assert error.stage == "parameter" and error.tensor == "decoder.weight.exp_avg_sq"
    assert everything_is_finite(trainer)


def test_infinities_that_are_masked_are_not_blamed():
    trainer = ToyTrainer()
    harmless = torch.tensor([0.0, 1.0])
    trainer.weird_term = lambda v: torch.where(harmless > 0, harmless.log(), 0.0).sum() + v / 0.0
    assert fail(trainer).origin.name == "operation div"


def test_of_two_births_in_one_term_the_first_is_told():
    trainer = ToyTrainer()
    trainer.weird_term = lambda value: value / 0.0 + (value * 0).log()
    assert fail(trainer).origin.name == "operation div"


# -- cost ------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts how often a value is read from the device, which makes a GPU wait."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.__name__ in ("_local_scalar_dense.default", "is_nonzero.default")
        return func(*args, **(kwargs or {}))


def test_a_deferred_step_reads_the_device_once():
    trainer = ToyTrainer(deferred=True).run(3)
    terms = trainer.loss_terms(trainer.batch)
    norm = torch.tensor(1.0)
    with CountReads() as counted:
        trainer.guard.before_backward(terms, trainer)
        trainer.guard.after_backward(trainer, norm)
        trainer.guard.after_step(trainer)
    assert counted.reads == 1


def test_the_end_of_an_epoch_sees_the_last_step():
    trainer = ToyTrainer(deferred=True).run(2)
    trainer.model.decoder.bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="decoder.bias"):
        trainer.guard.end_of_epoch(trainer)
    assert everything_is_finite(trainer)


def test_an_unknown_policy_is_refused():
    with pytest.raises(CellopError, match="did you mean 'rollback'"):
        ToyTrainer(on_nonfinite="rolback")


def test_a_loop_without_begin_step_works_too():
    trainer = ToyTrainer(calls_begin=False).run(3)
    trainer.counts[1, 1] = math.nan
    assert fail(trainer).cells == ["cell1"]
