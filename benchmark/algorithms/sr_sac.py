"""SR-SAC: scaled-by-resetting SAC (D'Oro et al., ICLR 2023, OpenReview OpC-9aBBVJe).

SAC with 32 updates per step. A network that is trained so much on little data learns less from what
comes later. So after every 2.56 million updates, at UTD 32 every 80 000 agent steps, actor,
critics, target, temperature and optimisers begin anew, while the replay buffer stays. The fresh
policy acts at once.

    python benchmark/algorithms/sr_sac.py --env-id dm_control/cheetah-run-v0
    python benchmark/algorithms/sr_sac.py --env-id dm_control/cheetah-run-v0 --utd 8
    python benchmark/algorithms/sr_sac.py --env-id dm_control/cheetah-run-v0 --action-repeat 1

The settings are those of CrossQ + WN's paper; the last command is SR-SAC's own, without action
repeat. The authors' code resets at the next evaluation, and to the very same initial weights. Here
the reset comes when it is due, and the weights are new. Log stds are cut to [-20, 2]; there they
are squashed into [-10, 2]. Other flags, files and errors are those of sac_baseline.py.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac_baseline  # noqa: E402


@dataclasses.dataclass
class Args(sac_baseline.Args):
    critic_lr: float = 3e-4  # Adam
    actor_lr: float = 3e-4  # Adam
    alpha_lr: float = 3e-4  # Adam, of the temperature; 0 keeps it at --alpha
    utd: int = 32  # critic updates per agent step (the paper's replay ratio)
    learning_starts: int = 10_000  # random agent steps before the first update
    entropy_factor: float = 0.5  # the target entropy is -this * dim(A)
    reset_every: int = 2_560_000  # updates between resets

    @staticmethod
    def suite_defaults(env_id):
        """CrossQ + WN's paper repeats actions; the original does not."""
        myo = {"action_repeat": 2, "gamma": 0.95}
        suites = {"shimmy": {"action_repeat": 2}, "myosuite": myo}
        return suites.get(sac_baseline.suite_of(env_id), {})


class Agent(sac_baseline.Agent):
    def __init__(self, obs_dim, action_dim, args):
        super().__init__(obs_dim, action_dim, args)
        self.target_entropy = -args.entropy_factor * action_dim

    def update(self, batch, rng):
        """SAC's update, and after every reset_every-th one a reset."""
        info = super().update(batch, rng)
        if self.n_updates % self.args.reset_every == 0:
            self.reset()
            self.to(rng.device)  # a reset makes them on the CPU
        return info


def main(argv=None, **parts):
    return sac_baseline.main(argv, **{"Args": Args, "Agent": Agent} | parts)


if __name__ == "__main__":
    sys.exit(main())
