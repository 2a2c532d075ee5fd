"""Parity with sb3-contrib's CrossQ, which nobody here wrote: same weights, batches and noise, nine updates in a row.

Its differences are undone one by one, visibly; everything else must agree, to 1e-5 and better, in float64.
"""

import gymnasium as gym
import pytest
import torch

import crossq_sac

sb3_contrib = pytest.importorskip("sb3_contrib", reason="pip install -r tests/requirements.txt")

from sb3_contrib.common.torch_layers import BatchRenorm  # noqa: E402
from stable_baselines3.common.logger import configure  # noqa: E402
from stable_baselines3.common.type_aliases import ReplayBufferSamples  # noqa: E402

OBS, ACTIONS, BATCH, WIDTH = 11, 3, 32, 24


class Box(gym.Env):
    """Spaces only, with actions in [-1, 1]: there sb3-contrib's log-probabilities are ours."""

    observation_space = gym.spaces.Box(-1, 1, (OBS,))
    action_space = gym.spaces.Box(-1, 1, (ACTIONS,))


@pytest.fixture
def reference(monkeypatch):
    model = sb3_contrib.CrossQ(
        "MlpPolicy", Box(), batch_size=BATCH, device="cpu", policy_kwargs={"net_arch": [WIDTH, WIDTH]}
    )
    model.set_logger(configure(None, []))
    # 1. Its batch variance is the unbiased one.
    var = torch.Tensor.var
    monkeypatch.setattr(torch.Tensor, "var", lambda self, dim: var(self, dim=dim, correction=0))
    # 2. It adds 1e-6 inside the logarithm of the tanh correction.
    model.actor.action_dist.epsilon = 0.0
    # Its noise is kept, to be used again.
    model.noise = []
    model.policy.double()

    def rsample(self, sample_shape=()):
        model.noise.append(torch.randn_like(self.loc))
        return self.loc + self.scale * model.noise[-1]

    monkeypatch.setattr(torch.distributions.Normal, "rsample", rsample)
    return model


def weights_of(model) -> dict[str, torch.Tensor]:
    """sb3-contrib's weights and running statistics under our names and in our shapes."""
    critics, actor, out = model.critic.q_networks, [model.actor.latent_pi], {}
    for prefix, nets, lead in (("critic", critics, (len(critics),)), ("actor", actor, ())):
        norms = [[m for m in net if isinstance(m, BatchRenorm)] for net in nets]
        linears = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in nets]

        def put(name, tensors, shape):
            out[name] = torch.stack(list(tensors)).detach().clone().reshape(shape)  # noqa: B023

        for k in range(3):
            for ours, theirs in {
                "scale": "scale", "bias": "bias", "running_mean": "ra_mean", "running_var": "ra_var"
            }.items():  # fmt: skip
                put(f"{prefix}.norms.{k}.{ours}", (getattr(n[k], theirs) for n in norms), (*lead, 1, -1))
            out[f"{prefix}.norms.{k}.steps"] = norms[0][k].steps.clone()
        for k, layer in enumerate(["dense.0", "dense.1", "head"][: len(linears[0])]):
            shape = (*lead, linears[0][k].in_features, linears[0][k].out_features)
            put(f"{prefix}.{layer}.weight", (net[k].weight.T for net in linears), shape)
            put(f"{prefix}.{layer}.bias", (net[k].bias for net in linears), (*lead, 1, shape[-1]))
    heads = [model.actor.mu, model.actor.log_std]
    out["actor.head.weight"] = torch.cat([h.weight.detach().T for h in heads], 1)
    out["actor.head.bias"] = torch.cat([h.bias.detach() for h in heads])[None]
    return out | {"log_alpha": model.log_ent_coef.detach()[0].double()}


def test_nine_updates_agree_with_sb3_contrib(reference):
    """Losses, weights and running statistics, over three policy delays."""
    torch.manual_seed(0)
    args = crossq_sac.Args(critic_width=WIDTH, actor_width=WIDTH, batch_size=BATCH, compile="off")
    agent = crossq_sac.Agent(OBS, ACTIONS, args).double()
    missing, unexpected = agent.load_state_dict(weights_of(reference), strict=False)
    assert not missing and not unexpected
    for update in range(1, 10):
        obs, next_obs = torch.randn(2, BATCH, OBS).double()
        action, reward = torch.rand(BATCH, ACTIONS).double() * 2 - 1, torch.randn(BATCH).double()
        done = (torch.rand(BATCH) < 0.1).double()
        samples = ReplayBufferSamples(obs, action, next_obs, done[:, None], reward[:, None], None)
        reference.replay_buffer.sample = lambda *_, samples=samples, **__: samples
        reference.noise.clear()
        reference.train(gradient_steps=1, batch_size=BATCH)
        logged = reference.logger.name_to_value
        info = agent.update_critic(obs, action, reward, done, next_obs, reference.noise[0])
        assert info["critic_loss"].item() == pytest.approx(logged["train/critic_loss"], rel=1e-5, abs=1e-5)
        if update % 3 == 0:
            info = agent.update_actor(obs, reference.noise[1])
            assert info["actor_loss"].item() == pytest.approx(logged["train/actor_loss"], rel=1e-5, abs=1e-5)
            # 3. It takes log alpha in place of alpha in the temperature's loss: another step size, the same sign.
            moved = agent.log_alpha.detach() - reference.log_ent_coef.detach()[0]
            assert abs(moved) < 1e-3
            with torch.no_grad():
                reference.log_ent_coef.fill_(agent.log_alpha)
        assert len(reference.noise) == 1 + (update % 3 == 0)
        ours = agent.state_dict()
        for name, theirs in weights_of(reference).items():
            assert torch.allclose(ours[name], theirs, rtol=1e-5, atol=1e-5), (update, name)
