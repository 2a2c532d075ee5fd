"""SR-SAC: scaled-by-resetting SAC (D'Oro et al., ICLR 2023, OpenReview OpC-9aBBVJe).

SAC with 32 updates per step. A network that is trained so much on little data learns less from what
comes later. So after every 2.56 million updates, at UTD 32 every 80 000 agent steps, networks,
temperature and optimisers begin anew, while the replay buffer stays. The fresh policy acts at once.

    python benchmark/algorithms/sr_sac.py --env-id shimmy:dm_control/cheetah-run-v0
    python benchmark/algorithms/sr_sac.py --env-id shimmy:dm_control/cheetah-run-v0 --utd 8

The settings are those of CrossQ + WN's paper, which adds `--action-repeat 2`, and on MyoSuite
`--gamma 0.95`. The authors' code resets at the next evaluation, and to the very same initial
weights. Here the reset comes when it is due, and the weights are new. Log stds are cut to [-20, 2].
There they are squashed into [-10, 2]. Other flags and files are those of sac_baseline.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402


@dataclass
class Args(sac_baseline.Args):
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    alpha_lr: float = 3e-4  # Adam, of the temperature
    utd: int = 32  # critic updates per agent step (the paper's replay ratio)
    learning_starts: int = 10_000  # random agent steps before the first update
    entropy_factor: float = 0.5  # target entropy: -this * dim(A)
    reset_every: int = 2_560_000  # updates between resets


class Agent(sac_baseline.Agent):
    """Its losses are sac_baseline.py's."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.obs_dim = obs_dim
        self.target_entropy = -args.entropy_factor * action_dim

    def update(self, batch, rng):
        """SAC's update, and after every reset_every-th one a reset."""
        info = super().update(batch, rng)
        if self.n_updates % self.args.reset_every == 0:
            reset(self)
        return info


def reset(agent):
    """Networks, temperature and optimisers take the state of a fresh agent's. The seed lets a
    resumed run draw the same weights."""
    torch.manual_seed(sac_baseline.reset_seed(agent.args.seed, agent.n_updates))
    fresh = type(agent)(agent.obs_dim, agent.action_dim, agent.args)
    agent.load_state_dict(fresh.state_dict())
    for name, optimizer in vars(fresh).items():
        if isinstance(optimizer, Optimizer):
            getattr(agent, name).load_state_dict(optimizer.state_dict())


def main(argv=None, **parts):
    sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    main()
