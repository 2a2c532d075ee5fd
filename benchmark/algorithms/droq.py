"""DroQ: dropout Q-functions (Hiraoka et al., ICLR 2022, arXiv 2110.02034).

REDQ's twenty updates per step with two critics in place of ten: dropout and layer norm do the
ensemble's work. Dropout is on in every forward of a critic, for the target and the actor too, each
time with other masks. The target is the minimum over the two critics; the actor maximises their
mean.

    python benchmark/algorithms/droq.py --env-id Hopper-v4                 # as in CrossQ's paper
    python benchmark/algorithms/droq.py --critic-lr 3e-4 --actor-lr 3e-4 --alpha-lr 3e-4  # its own
    python benchmark/algorithms/droq.py --critic-width 2048 --adam-beta1 0.5  # CrossQ, figure 15

With the second command DroQ still has -dim(A) as its target entropy; its authors have MBPO's, -1 on
Hopper and -3 on HalfCheetah, and a dropout for each task. Other flags, files and errors are those
of sac_baseline.py.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402


@dataclasses.dataclass
class Args(sac_baseline.Args):
    dropout: float = 0.01  # share of hidden units that are dropped
    utd: int = 20  # critic updates per agent step (update-to-data ratio)
    policy_delay: int = 20  # critic updates per actor update; at UTD 20 once per agent step

    MAY_BE_ZERO = sac_baseline.Args.MAY_BE_ZERO | {"dropout"}
    AT_MOST = sac_baseline.Args.AT_MOST | {"dropout": 0.999}

    @staticmethod
    def suite_defaults(env_id):
        """SAC's, but for the policy delay, which is the same everywhere."""
        return sac_baseline.Args.suite_defaults(env_id) | {"policy_delay": 20}


class DropoutMLP(sac_baseline.MLP):
    """(Dense -> dropout -> layer norm -> ReLU) x 2 -> dense: [B, n_in] -> [N, B, n_out].

    `uniform`, two of [N, B, width] in [0, 1), is set before a forward and says what is dropped. The
    rest is divided by its share, so that the mean is the same. In eval mode nothing is dropped.
    """

    def __init__(self, n_in, width, n_out, dropout, ensemble=()):
        super().__init__(n_in, width, n_out, ensemble)
        self.keep = 1 - dropout
        self.scales = nn.ParameterList(torch.ones(*ensemble, 1, width) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(*ensemble, 1, width) for _ in range(2))

    def forward(self, x):
        for k in range(2):
            x = x @ self.weights[k] + self.biases[k]
            if self.training:
                x = x * (self.uniform[k] < self.keep) / self.keep
            x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)  # eps: CrossQ's code, JAX's
            x = (x * self.scales[k] + self.shifts[k]).relu()
        return x @ self.weights[2] + self.biases[2]


class Agent(sac_baseline.Agent):
    def make_critic(self):
        n_in, args = self.obs_dim + self.action_dim, self.args
        return DropoutMLP(n_in, args.critic_width, 1, args.dropout, ensemble=(args.n_critics,))

    def draw(self, batch, rng):
        """Also the uniform numbers that decide what is dropped, in critic and target. They come
        from the run's generator, so that a resume is exact."""
        shape = 2, self.args.n_critics, len(batch[0]), self.args.critic_width
        draws = super().draw(batch, rng)
        for name in ("critic", "target"):
            draws[name] = torch.rand(shape, generator=rng, device=rng.device)
        return draws

    def critic_loss(self, batch, draws):
        self.set_dropout(draws)
        return super().critic_loss(batch, draws)

    def actor_loss(self, batch, draws):
        self.set_dropout(draws)
        return super().actor_loss(batch, draws)

    def set_dropout(self, draws):
        self.critic.train()
        self.critic.uniform = draws["critic"]
        self.target_critic.train()
        self.target_critic.uniform = draws["target"]

    def actor_q(self, q):
        return q.mean(0)


def main(argv=None, **parts):
    return sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    sys.exit(main())
