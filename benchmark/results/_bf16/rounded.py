"""crossq_sac.py --bf16 for a processor without bfloat16 units, where such products are slow: the
same rounding, in float32 arithmetic. Sums may come in another order. probe.py measures the run.

    python benchmark/results/_bf16/rounded.py --env-id HalfCheetah-v4 --critic-width 256
"""

import sys
from pathlib import Path

import torch
import torch._inductor.config

sys.path.append(str(Path(__file__).resolve().parents[2]))
import probe  # noqa: E402

crossq_sac = probe.load("crossq_sac.py")
torch._inductor.config.emulate_precision_casts = True  # or fused kernels leave the rounding out


class MLP(crossq_sac.MLP):
    def forward(self, *inputs):
        x = self.norms[0](torch.cat(inputs, -1)) @ self.weights[0] + self.biases[0]
        x = self.norms[1](x.relu()).bfloat16().float()
        weight = self.weights[1].bfloat16().float()
        x = (x @ weight).bfloat16() + self.biases[1]  # the gradients are rounded on the way back
        return self.norms[2](x.relu()) @ self.weights[2] + self.biases[2]


class Agent(crossq_sac.Agent):
    def __init__(self, *sizes_and_args):
        super().__init__(*sizes_and_args)
        self.critic.__class__ = self.actor.__class__ = MLP


if __name__ == "__main__":
    crossq_sac.main(sys.argv[1:], **probe.probed(crossq_sac, Agent))
