"""DRAKES with any f-divergence: the exact gradient by enumeration of paths; training."""

from math import log

import pytest
import torch
from enumerable_masked import TOKENS, Instance, TableNet
from table_policies import all_paths, denoiser, gradient, noise, start
from torch import Tensor
from torch.nn.functional import one_hot

from diffdiv.core import masking
from diffdiv.core.divergence import DIVERGENCES, get_divergence
from diffdiv.objectives import drakes, rollout
from diffdiv.objectives import policy_gradient as pg

ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)
TO = pytest.mark.parametrize("to", ["reference", "target"])
RHO = 0.4
CHAIN = masking.Chain((1.0, 0.5, 0.0), (1.0, 1 - RHO, 0.0))


@pytest.fixture(scope="module")
def instance() -> Instance:
    return Instance()


@ALL
@TO
def test_the_reward_and_the_rest_make_the_divergence(instance, divergence, to):
    """The exact gradient of the reward plus the score function of the rest is the gradient of the
    whole, over all paths."""
    of, alpha = denoiser(TableNet(instance.perturbed(0.3, 1))), 0.7
    reference = denoiser(instance.reference_net())
    paths, times = all_paths(RHO)
    log_p = rollout.step_log_probs(of, paths).sum(0) + times.log()
    with torch.no_grad():
        log_ref = rollout.step_log_probs(reference, paths).sum(0) + times.log()
    reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
    regulariser, p = pg.Regulariser(divergence, alpha, to=to), log_p.exp()
    if to == "reference":
        log_z = torch.zeros(())
        exact = p @ (reward - alpha * divergence.f(log_ref - log_p))
    else:
        log_z = torch.logsumexp(log_ref + reward / alpha, 0)
        exact = -alpha * (p @ divergence.f(log_ref + reward / alpha - log_z - log_p))
    rest = regulariser.beyond_reward(reward, (log_p - log_ref).detach(), log_z)
    difference = gradient(exact - regulariser.reward_weight * (p @ reward), of)
    found = -gradient(pg.policy_gradient_loss(of, paths, p.detach() * len(p) * rest), of)
    torch.testing.assert_close(found, difference, rtol=1e-8, atol=1e-12)


@ALL
def test_weight_of_the_reward_is_a_slope(instance, divergence):
    """To the target, where policy and target agree, the advantage grows with r by that much."""
    regulariser = pg.Regulariser(divergence, 0.7, to="target")
    reward, step = torch.linspace(-1, 1, 5).double(), 1e-5
    at = [regulariser.advantage(reward + d, reward / 0.7) for d in (step, -step)]
    slope = (at[0] - at[1]) / (2 * step)
    torch.testing.assert_close(
        slope, torch.full_like(slope, regulariser.reward_weight), rtol=1e-6, atol=0
    )


def loss_of(instance, of, batch=256, hard="step", seed=0, level="path", name="reverse_kl", **more):
    """The loss on sampled trajectories of the grid."""
    chain = masking.log_linear().chain(8)
    regulariser = pg.Regulariser(get_divergence(name), 0.5, level=level, **more)
    path = drakes.SoftPath(chain, 8, tau=0.7, hard=hard)
    return drakes.divergence_drakes_loss(
        of, denoiser(instance.reference_net()), instance.reward_of, start(batch),
        noise(batch, seed), path=path, regulariser=regulariser,
    )[0]  # fmt: skip


def test_step_level_is_drakes(instance):
    of, chain = denoiser(TableNet(instance.perturbed(0.5, 1))), masking.log_linear().chain(8)
    plain, _ = drakes.drakes_loss(
        of, denoiser(instance.reference_net()), instance.reward_of, start(64), noise(64),
        path=drakes.SoftPath(chain, 8, tau=0.7, hard="step"), alpha=0.5,
    )  # fmt: skip
    assert torch.equal(loss_of(instance, of, batch=64, level="step"), plain)


@TO
def test_the_rest_comes_from_the_same_noise(instance, to):
    """Jensen-Shannon, its penalty in closed form: the reward through soft states plus the score
    function on the token trajectories of the same noise."""
    of, chain = denoiser(TableNet(instance.perturbed(0.5, 1))), masking.log_linear().chain(8)
    reference, alpha = denoiser(instance.reference_net()), 0.5
    found = gradient(loss_of(instance, of, batch=64, name="jensen_shannon", to=to), of)
    weight = 1.0 if to == "reference" else 0.5
    plain, _ = drakes.drakes_loss(
        of, None, instance.reward_of, start(64), noise(64),
        path=drakes.SoftPath(chain, 8, tau=0.7, hard="step"), alpha=0.0,
    )  # fmt: skip
    paths = rollout.roll_out(of, chain, noise(64), start(64))
    s = rollout.path_log_ratio(paths, reference)
    reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
    if to == "target":
        s = s - reward / alpha + torch.logsumexp(reward / alpha - s, 0) - log(64)
    price = -alpha * (log(2) - torch.nn.functional.softplus(-s))
    rest = price - (weight * reward if to == "target" else 0)
    rest = pg.policy_gradient_loss(of, paths, pg.leave_one_out(rest))
    expected = weight * gradient(plain, of) + gradient(rest, of)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # rewards of float32 one-hots


#: share of the attainable gain when written; a bound is 0.1 below
SHARES = {
    ("reverse_kl", "reference"): 0.86, ("forward_kl", "reference"): 0.76,
    ("jensen_shannon", "reference"): 0.99, ("softened_reverse_kl", "reference"): 0.90,
    ("forward_kl", "target"): 0.75,
    ("jensen_shannon", "target"): 0.56, ("softened_reverse_kl", "target"): 0.92,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), SHARES)
def test_training_moves_towards_the_optimum(instance, name, to):
    """E[r] - alpha D_f, or -alpha D_f to the target, by enumeration of two-step paths, before and
    after 150 updates of 128, as a share of what exact ascent finds. The plain policy gradient
    reaches 0.91 to 0.97 in all of them: the gap is the bias of differentiated trajectories. With
    hard = "end", reference: 0.77, 0.83, 0.96, 0.79; target: 0.77, 0.27, 0.04, 0.92."""
    divergence, alpha = get_divergence(name), 0.5
    paths, times = all_paths(RHO)
    reference = denoiser(instance.reference_net())
    reward = instance.reward_of(one_hot(paths.tokens, TOKENS).double())
    with torch.no_grad():
        log_ref = rollout.step_log_probs(reference, paths).sum(0) + times.log()
    log_z = torch.logsumexp(log_ref + reward / alpha, 0)

    def exact(of) -> Tensor:
        log_p = rollout.step_log_probs(of, paths).sum(0) + times.log()
        if to == "reference":
            return log_p.exp() @ (reward - alpha * divergence.f(log_ref - log_p))
        return -alpha * (log_p.exp() @ divergence.f(log_ref + reward / alpha - log_z - log_p))

    def trained(loss_at, steps, lr) -> float:
        of = denoiser(TableNet(instance.reference))
        optimizer = torch.optim.Adam(of.net.parameters(), lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 1.5 * (1 - step / steps))
            optimizer.zero_grad()
            loss_at(of, step).backward()
            optimizer.step()
        with torch.no_grad():
            return float(exact(of))

    def sampled(of, step) -> Tensor:
        return drakes.divergence_drakes_loss(
            of, reference, instance.reward_of, start(128), noise(128, step + 1),
            path=drakes.SoftPath(CHAIN, 2, tau=0.7, hard="step"),
            regulariser=pg.Regulariser(divergence, alpha, to=to),
        )[0]  # fmt: skip

    with torch.no_grad():
        floor = float(exact(denoiser(TableNet(instance.reference))))
    best = trained(lambda of, step: -exact(of), 120, 0.1)
    share = (trained(sampled, 150, 0.05) - floor) / (best - floor)
    assert SHARES[name, to] - 0.1 <= share <= 1 + 1e-6
