"""Parity with code that nobody here wrote: sb3-contrib's CrossQ and stable-baselines3's SAC.

Same weights, batches and noise, nine updates in a row, in float64: losses, temperature, running
statistics, target networks and weights agree to 1e-8. Their differences are undone one by one,
where the comments count them.
"""

import os

import gymnasium as gym
import pytest
import torch

import crossq_sac
import sac_baseline

if not os.environ.get("CI"):  # there a missing package is a failure
    pytest.importorskip("sb3_contrib", reason="pip install -r tests/requirements.txt")

import sb3_contrib  # noqa: E402
from sb3_contrib.common.torch_layers import BatchRenorm  # noqa: E402
from stable_baselines3 import SAC  # noqa: E402
from stable_baselines3.common.logger import configure  # noqa: E402
from stable_baselines3.common.torch_layers import FlattenExtractor  # noqa: E402
from stable_baselines3.common.type_aliases import ReplayBufferSamples  # noqa: E402

OBS, ACTIONS, BATCH, WIDTH, UPDATES = 11, 3, 32, 24, 9
close = {"rel": 1e-8, "abs": 1e-8}


class Box(gym.Env):
    """Spaces only, with actions in [-1, 1]: there their log-probabilities are ours."""

    observation_space = gym.spaces.Box(-1, 1, (OBS,))
    action_space = gym.spaces.Box(-1, 1, (ACTIONS,))


@pytest.fixture
def reference(monkeypatch):
    """reference(class, ...) is their model in float64; model.noise keeps what it draws."""

    def make(algorithm, **arguments):
        torch.manual_seed(0)
        arguments |= {"batch_size": BATCH, "policy_kwargs": {"net_arch": [WIDTH, WIDTH]}}
        model = algorithm("MlpPolicy", Box(), device="cpu", **arguments)
        model.set_logger(configure(None, []))
        model.policy.double()
        model.log_ent_coef.data = model.log_ent_coef.data.double()
        for net in model.policy.modules():  # their preprocessing casts observations to float32
            if isinstance(net, FlattenExtractor):
                net.register_forward_hook(lambda module, inputs, output: output.double())
        # 1. They add 1e-6 inside the logarithm of the tanh correction.
        model.actor.action_dist.epsilon = 0.0
        # 2. Their temperature's loss is log alpha * (H - target), ours alpha * (H - target): the
        #    same sign, alpha times the gradient.
        model.log_ent_coef.register_hook(
            lambda gradient: gradient * model.log_ent_coef.detach().exp()
        )
        model.noise = []

        def rsample(self, sample_shape=()):
            model.noise.append(torch.randn(self.loc.shape, dtype=self.loc.dtype))
            return self.loc + self.scale * model.noise[-1]

        monkeypatch.setattr(torch.distributions.Normal, "rsample", rsample)
        return model

    return make


def weights_of(model) -> dict[str, torch.Tensor]:
    """Their weights and running statistics under our names and in our shapes."""
    nets = {
        "critic": model.critic.q_networks,
        "actor": [[*model.actor.latent_pi, model.actor.mu, model.actor.log_std]],
    }
    if hasattr(model, "critic_target"):
        nets["target_critic"] = model.critic_target.q_networks
    out = {"log_alpha": model.log_ent_coef[0]}
    for prefix, members in nets.items():
        join = torch.stack if "critic" in prefix else torch.cat  # our critics are one ensemble
        norms = [[m for m in net if isinstance(m, BatchRenorm)] for net in members]
        for k, layers in enumerate(zip(*norms)):
            names = {"scale": "scale", "bias": "bias"}
            names |= {"running_mean": "ra_mean", "running_var": "ra_var"}
            for ours, theirs in names.items():
                parts = [getattr(layer, theirs)[None] for layer in layers]
                out[f"{prefix}.norms.{k}.{ours}"] = join(parts)
            out[f"{prefix}.norms.{k}.steps"] = layers[0].steps
        linears = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in members]
        for k, layers in enumerate(zip(*linears)):
            out[f"{prefix}.weights.{k}"] = join([layer.weight.T for layer in layers])
            out[f"{prefix}.biases.{k}"] = join([layer.bias[None] for layer in layers])
    for name in ("actor.weights", "actor.biases"):  # our last layer has both: mean and log_std
        out[f"{name}.2"] = torch.cat([out.pop(f"{name}.{k}") for k in (2, 3)], -1)
    return {name: tensor.detach().clone() for name, tensor in out.items()}


def compare(model, module, draws, policy_delay, **changes):
    """UPDATES times model.train() beside agent.update(); `draws`: what their noise is for."""
    args = module.Args(critic_width=WIDTH, actor_width=WIDTH, **changes)
    agent = module.Agent(OBS, ACTIONS, args).double()
    agent.load_state_dict(weights_of(model))  # strict: every tensor of ours has one of theirs
    queue = []
    for name in ("critic_loss", "actor_loss"):
        loss = getattr(agent, name)
        setattr(agent, name, lambda batch, _, loss=loss: loss(batch, queue.pop(0)))
    for update in range(1, UPDATES + 1):
        obs, next_obs = torch.randn(2, BATCH, OBS).double()
        action, reward = torch.rand(BATCH, ACTIONS).double() * 2 - 1, torch.randn(BATCH).double()
        done = (torch.rand(BATCH) < 0.1).double()
        samples = ReplayBufferSamples(obs, action, next_obs, done[:, None], reward[:, None], None)
        model.replay_buffer.sample = lambda *_, samples=samples, **__: samples
        model.noise.clear()
        model.train(gradient_steps=1, batch_size=BATCH)
        logged = model.logger.name_to_value
        noise, moves = dict(zip(draws, model.noise)), update % policy_delay == 0
        assert len(model.noise) == 1 + moves
        queue[:] = [noise[name] for name in ("next_obs", "obs") if name in noise]  # our order
        info = agent.update((obs, action, reward, done, next_obs), torch.Generator())
        assert not queue and ("losses/actor" in info) == moves
        assert info["losses/critic"].item() == pytest.approx(logged["train/critic_loss"], **close)
        if moves:
            assert info["losses/actor"].item() == pytest.approx(logged["train/actor_loss"], **close)
        ours = agent.state_dict()
        for name, theirs in weights_of(model).items():
            assert torch.allclose(ours[name], theirs, rtol=1e-8, atol=1e-8), (update, name)


@pytest.fixture
def biased_variance(monkeypatch):
    """3. The batch variance of sb3-contrib is the unbiased one."""
    var = torch.Tensor.var
    monkeypatch.setattr(torch.Tensor, "var", lambda self, dim: var(self, dim=dim, correction=0))


def test_nine_updates_agree_with_sb3_contrib(reference, biased_variance):
    """crossq_sac.py against CrossQ, over three policy delays, in the warm-up of batch renorm."""
    compare(reference(sb3_contrib.CrossQ), crossq_sac, ["next_obs", "obs"], 3)


def test_nine_updates_agree_with_sb3_contrib_after_the_warm_up(
    reference, biased_variance, monkeypatch
):
    """The same, where the first training forward of a layer is all of its warm-up."""
    model = reference(sb3_contrib.CrossQ)
    for layer in model.policy.modules():
        if isinstance(layer, BatchRenorm):
            layer.warmup_steps = 0  # 4. It ends one forward later than ours.
            layer.eps = 0.0  # 5. It has epsilon in other places. Without, its formula is ours.
        if isinstance(layer, torch.nn.Linear):  # so that no unit is dead, of variance 0
            torch.nn.init.constant_(layer.bias, 1.0)
    monkeypatch.setattr(crossq_sac.BatchRenorm, "eps", 0.0)
    compare(model, crossq_sac, ["next_obs", "obs"], 3, brn_warmup=1)


def test_nine_updates_agree_with_stable_baselines3(reference):
    """sac_baseline.py against SAC, target networks too."""
    arguments = {"learning_rate": 1e-3, "ent_coef": "auto_1.0", "tau": 0.005, "gamma": 0.99}
    model = reference(SAC, **arguments)
    with torch.no_grad():  # a target network far from the critic: mistaking one for the other shows
        for p in model.critic_target.parameters():
            p += 0.1 * torch.randn_like(p)
    # 3. It draws the noise of pi(obs) before that of pi(next_obs).
    compare(model, sac_baseline, ["obs", "next_obs"], 1)
