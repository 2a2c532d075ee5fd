"""CrossQ with SBX's loss of the temperature, log alpha * (entropy - target). CrossQ's own code and
the scripts here have alpha * (entropy - target). This file is for the scripts of commit 9b27732:

    PYTHONPATH=. OMP_NUM_THREADS=1 python log_alpha.py --env-id Ant-v4 --seed SEED \
        --critic-width 512 --total-timesteps 100000 --eval-every 5000
"""

import crossq_sac


class Agent(crossq_sac.Agent):
    def alpha_loss(self, entropy):
        return self.log_alpha * (entropy - self.target_entropy), {"diagnostics/alpha": self.alpha()}


if __name__ == "__main__":
    crossq_sac.main(Agent=Agent)
