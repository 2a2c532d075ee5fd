"""REDQ: randomised ensembled double Q-learning (Chen et al., ICLR 2021, arXiv 2101.05982).

SAC with ten critics and twenty updates per step. Two critics would over-estimate after so many
updates on the same data. Here each target is the minimum over two critics drawn at random, and the
actor maximises the mean over all ten.

    python benchmark/algorithms/redq.py --env-id Hopper-v4                 # as in CrossQ's paper
    python benchmark/algorithms/redq.py --critic-lr 3e-4 --actor-lr 3e-4 --alpha-lr 3e-4  # its own
    python benchmark/algorithms/redq.py --critic-width 2048 --adam-beta1 0.5  # CrossQ, figure 14

On DeepMind Control CrossQ's paper has `--critic-lr 8e-4 --actor-lr 8e-4 --alpha-lr 8e-4`, and
run.sh adds `--action-repeat 2`. The authors' target entropies are MBPO's, -1 on Hopper and -3 on
HalfCheetah. Here it is -dim(A). Other flags and files are those of sac_baseline.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402


@dataclass
class Args(sac_baseline.Args):
    n_critics: int = 10  # Q-functions (the paper's N)
    n_target_critics: int = 2  # of them, drawn anew for each update's target (the paper's M)
    utd: int = 20  # critic updates per agent step (the paper's G)
    policy_delay: int = 20  # critic updates per actor update; at UTD 20 once per agent step


class Agent(sac_baseline.Agent):
    def draw(self, batch, rng):
        """A loss's random numbers: the target's critics [M], and the policy's noise [B, A]."""
        order = torch.randperm(self.args.n_critics, generator=rng, device=rng.device)
        noise = torch.randn(batch[1].shape, generator=rng, device=rng.device)
        return order[: self.args.n_target_critics], noise

    def critic_loss(self, batch, draws):
        """Half the squared Bellman error: mean over the batch, sum over all critics."""
        obs, action, reward, terminated, next_obs = batch
        subset, noise = draws
        with torch.no_grad():
            next_action, next_log_prob = self.policy(next_obs, noise)
            next_q = self.target_critic(next_obs, next_action).squeeze(-1)  # [n_critics, B]

        q = self.critic(obs, action).squeeze(-1)  # [n_critics, B]

        # One subset for the whole batch.
        next_value = next_q[subset].min(0).values - self.log_alpha.exp() * next_log_prob  # [B]
        target = (reward + self.args.gamma * (1 - terminated) * next_value).detach()
        return 0.5 * (q - target).square().mean(1).sum(), q.mean()

    def actor_q(self, obs, action):
        """What the actor maximises, the mean over all critics: [B]."""
        return self.critic(obs, action).squeeze(-1).mean(0)

    def actor_loss(self, obs, draws):
        """Minus the soft value, Q - alpha * log-prob; and the policy's entropy."""
        _, noise = draws
        action, log_prob = self.policy(obs, noise)
        q = self.actor_q(obs, action)
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), -log_prob.mean()

    def update(self, batch, rng):
        """SAC's, with the draws above in place of the noise."""
        draws = self.draw(batch, rng)
        loss, q_mean = self.descend(self.critic_optimizer, self.critic_loss, batch, draws)
        self.move_target()
        info = {"losses/critic": loss, "diagnostics/q_mean": q_mean}
        self.n_updates += 1
        if self.n_updates % self.args.policy_delay == 0:
            draws = self.draw(batch, rng)
            self.critic.requires_grad_(False)  # skip its gradients
            loss, entropy = self.descend(self.actor_optimizer, self.actor_loss, batch[0], draws)
            self.critic.requires_grad_(True)
            alpha = self.log_alpha.exp()
            self.alpha_optimizer.zero_grad()
            (alpha * (entropy - self.target_entropy)).backward()
            self.alpha_optimizer.step()
            info |= {"losses/actor": loss, "losses/alpha": alpha, "diagnostics/entropy": entropy}
        return info


def main(argv=None, **parts):
    sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    main()
