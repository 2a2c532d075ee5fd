"""Are the updates of crossq_sac.py those of SBX's CrossQ, late in learning too? Both go on from a
run's last checkpoint, Adam's moments included, in float64, with the same batches and noise.

    pip install sbx-rl==0.28.0
    python benchmark/results/_ant/parity.py runs/NAME
"""

import sys
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import sbx
import torch
from tensorflow_probability.substrates.jax.distributions import MultivariateNormalDiag

sys.path.append(str(Path(__file__).resolve().parents[3]))
import crossq_sac  # noqa: E402

jax.config.update("jax_enable_x64", True)


class CrossQ(sbx.CrossQ):
    """With the temperature's loss of CrossQ's own code. SBX's has the logarithm of alpha."""

    @staticmethod
    @jax.jit
    def update_temperature(target_entropy, state, entropy):
        def loss(params):
            return state.apply_fn({"params": params}) * (entropy - target_entropy).mean()

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value


class Agent(crossq_sac.Agent):
    """With SBX's noise, a list, in place of what it draws."""

    def descend(self, optimizer, loss_fn, batch, _):
        return super().descend(optimizer, loss_fn, batch, self.noise.pop(0))


def ours(values, tree):
    """SBX's tree with the values of our tensors, which are keyed by name."""

    def leaf(path, old):
        name = path[-1].key
        if len(path) == 1:  # the temperature
            return np.array(values[name])
        kind, index = path[-2].key.split("_")
        if kind == "Dense":
            x = values[("weights." if name == "kernel" else "biases.") + str(min(int(index), 2))]
            if x.shape[-1] != old.shape[-1]:  # the actor's last layer is two in SBX
                x = x.chunk(2, -1)[int(index) - 2]
        else:
            name = {"mean": "running_mean", "var": "running_var"}.get(name, name)
            x = values.get(f"norms.{index}.{name}", np.array(old))
        return np.resize(np.array(x), np.shape(old))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def continued(state, parameters, optimizer):
    """SBX's state of training with our parameters and the moments that Adam has of them."""
    kept = {name: optimizer.state[p] for name, p in parameters.items()}
    adam, *rest = state.opt_state
    adam = adam._replace(
        count=int(next(iter(kept.values()))["step"]),
        mu=ours({name: v["exp_avg"] for name, v in kept.items()}, adam.mu),
        nu=ours({name: v["exp_avg_sq"] for name, v in kept.items()}, adam.nu),
    )
    return state.replace(params=ours(parameters, state.params), opt_state=(adam, *rest))


def network(state, mlp, optimizer):
    state = continued(state, dict(mlp.named_parameters()), optimizer)
    return state.replace(batch_stats=ours(mlp.state_dict(), state.batch_stats))


checkpoint = torch.load(Path(sys.argv[1], "checkpoint.pt"), "cpu", weights_only=True)
args = crossq_sac.Args(**checkpoint["args"])
env = crossq_sac.make_env(args)
sizes = env.observation_space.shape + env.action_space.shape
agent = Agent(*sizes, args).double().requires_grad_(False)
buffer, rng = crossq_sac.ReplayBuffer(*sizes, args), torch.Generator()
crossq_sac.load(checkpoint, agent, buffer, rng)
agent.n_updates = 0

widths = {"pi": [args.actor_width] * 2, "qf": [args.critic_width] * 2}
theirs = CrossQ("MlpPolicy", gym.make(args.env_id), policy_kwargs={"net_arch": widths})
critic = network(theirs.policy.qf_state, agent.critic, agent.critic_optimizer)
actor = network(theirs.policy.actor_state, agent.actor, agent.actor_optimizer)
log_alpha = {"log_ent_coef": agent.log_alpha}
alpha = continued(theirs.ent_coef_state, log_alpha, agent.alpha_optimizer)
agent.requires_grad_(True)

normal = MultivariateNormalDiag(scale_diag=np.ones((args.batch_size, sizes[1])))
key = jax.random.PRNGKey(0)
for update in range(1, 301):
    batch = [x.double() for x in buffer.sample(args.batch_size, rng)]
    obs, action, reward, terminated, next_obs = (x.numpy() for x in batch)
    after, critic_key, _ = jax.random.split(key, 3)
    actor_key = jax.random.split(after, 3)[2]
    keys = critic_key, actor_key
    agent.noise = [torch.tensor(np.array(normal.sample(seed=k))) for k in keys]
    agent.update(batch, rng)

    discounts = np.full(args.batch_size, args.gamma)
    critic, _, key = CrossQ.update_critic(
        actor, critic, alpha, obs, action, next_obs, reward, terminated, discounts, key
    )
    if update % args.policy_delay == 0:
        actor, critic, alpha, _, _, key = CrossQ.update_actor_and_temperature(
            actor, critic, alpha, obs, agent.target_entropy, key
        )

agent.critic.eval()
with torch.no_grad():
    q = agent.critic(batch[0], batch[1]).numpy()
their_q = critic.apply_fn(
    {"params": critic.params, "batch_stats": critic.batch_stats}, obs, action, train=False
)
print(f"Q {q.mean():.3f}, largest difference {np.abs(q - their_q).max():.1e}")
