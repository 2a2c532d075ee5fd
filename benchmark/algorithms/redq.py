"""REDQ: randomised ensembled double Q-learning (Chen et al., ICLR 2021, arXiv 2101.05982).

What it adds to SAC: ten critics, and twenty updates per step. Two critics would over-estimate after
so many updates on the same data. Here each target is the minimum over two critics drawn at random,
and the actor maximises the mean over all ten.

    python benchmark/algorithms/redq.py --env-id Hopper-v4                 # as in CrossQ's paper
    python benchmark/algorithms/redq.py --critic-lr 3e-4 --actor-lr 3e-4 --alpha-lr 3e-4  # its own
    python benchmark/algorithms/redq.py --critic-width 2048 --adam-beta1 0.5  # CrossQ, figure 14

With the second command REDQ still has -dim(A) as its target entropy; its authors have MBPO's, -1 on
Hopper and -3 on HalfCheetah. Other flags, files and errors are those of sac_baseline.py.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402


@dataclasses.dataclass
class Args(sac_baseline.Args):
    n_critics: int = 10  # Q-functions (the paper's N)
    n_target_critics: int = 2  # of them, drawn anew for each update's target (the paper's M)
    utd: int = 20  # critic updates per agent step (the paper's G)
    policy_delay: int = 20  # critic updates per actor update; at UTD 20 once per agent step

    @staticmethod
    def suite_defaults(env_id):
        """SAC's, but for the policy delay, which is the same everywhere."""
        return sac_baseline.Args.suite_defaults(env_id) | {"policy_delay": 20}


class Agent(sac_baseline.Agent):
    def __init__(self, obs_dim, action_dim, args):
        if args.n_target_critics > args.n_critics:
            sac_baseline.fail("--n-target-critics must be at most --n-critics,", args.n_critics)
        super().__init__(obs_dim, action_dim, args)

    def draw(self, batch, rng):
        """The critics of this update's target too: one subset for the whole batch."""
        shuffled = torch.randperm(self.args.n_critics, generator=rng, device=rng.device)
        return super().draw(batch, rng) | {"subset": shuffled[: self.args.n_target_critics]}

    def target_q(self, next_q, draws):
        return next_q[draws["subset"]].min(0).values

    def actor_q(self, q):
        return q.mean(0)


def main(argv=None, **parts):
    return sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    sys.exit(main())
