"""What keeps an update fast: few operators, no wait for the device, no growing memory."""

import functools
import gc
import importlib

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_cuda
from test_run import SCRIPTS
from torch.utils._python_dispatch import TorchDispatchMode

OBS, ACTIONS = 11, 3
ALGORITHMS = sorted(path.name for path in (ROOT / "benchmark" / "algorithms").glob("*.py"))
# Operators of an uncompiled critic update, and of one with an actor update. None may slip in.
OPERATORS = {
    "crossq_sac.py": (274, 585),
    "crossq_td3.py": (258, 509),
    "crossq_wn_highutd.py": (319, 607),
    "sac_baseline.py": (148, 307),
}
WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique2",
    "allclose",
}


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def make(script, compiled=False, device="cpu"):
    """A small agent, and a function that updates it once."""
    module = importlib.import_module(script.removesuffix(".py"))
    extended = importlib.import_module(module.Agent.__base__.__module__)
    ReplayBuffer = vars(module).get("ReplayBuffer") or extended.ReplayBuffer
    args = module.Args(critic_width=32, actor_width=32, policy_delay=2)
    device = torch.device(device)
    torch.manual_seed(0)
    agent = module.Agent(OBS, ACTIONS, args).to(device)
    buffer = ReplayBuffer(OBS, ACTIONS, module.Args(buffer_size=500), device)
    for reward in (0.0, 1.0):
        buffer.add(np.zeros(OBS), np.zeros(ACTIONS), reward, False, np.zeros(OBS))
    buffer.rows.normal_()
    buffer.size = 500
    rng = torch.Generator(device).manual_seed(0)
    if compiled:
        module.compile_updates(agent)
    return agent, lambda: agent.update(buffer.sample(32, rng), rng)


@pytest.mark.parametrize("script", SCRIPTS)
def test_operators_per_update(script):
    """No more than when they were measured, and as many in every update."""
    _, update = make(script)
    counts = []
    for _ in range(6):
        with Recorder() as recorder:
            update()
        counts.append(len(recorder.names))
    critic, both = counts[2::2], counts[3::2]  # the first of each makes the optimiser's state
    assert len(set(critic)) == len(set(both)) == 1
    for count, measured in ((critic[0], OPERATORS[script][0]), (both[0], OPERATORS[script][1])):
        assert count <= measured, counts
        assert count > 0.9 * measured, "lower the numbers here"


@pytest.mark.parametrize("script", [*SCRIPTS, *ALGORITHMS])
def test_no_operator_waits_for_the_device(script):
    _, update = make(script)
    for _ in range(4):
        with Recorder() as recorder:
            update()
        assert len(recorder.names) > 50 and not WAITS & set(recorder.names)


@pytest.mark.parametrize("script", [*SCRIPTS, *ALGORITHMS])
def test_no_operator_mixes_devices(script, monkeypatch):
    """What would fail on CUDA alone, seen without it: on the meta device no tensor has values."""
    module = importlib.import_module(script.removesuffix(".py"))
    extended = importlib.import_module(module.Agent.__base__.__module__)
    device, mixed, init = torch.device("meta"), [], torch.optim.Adam.__init__

    def unfused(*args, fused, **kwargs):  # fused optimisers do not exist there
        init(*args, **kwargs | {"foreach": False})

    monkeypatch.setattr(torch.optim.Adam, "__init__", unfused)

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            if len({x.device for x in leaves if isinstance(x, torch.Tensor)}) > 1:
                mixed.append(function)
            return function(*args, **(kwargs or {}))

    args = module.Args(critic_width=32, actor_width=32, buffer_size=500)
    with device:
        agent = module.Agent(OBS, ACTIONS, args)
    ReplayBuffer = vars(module).get("ReplayBuffer") or extended.ReplayBuffer
    buffer = ReplayBuffer(OBS, ACTIONS, args, device)
    buffer.add(np.zeros(OBS), np.zeros(ACTIONS), 0.0, False, np.zeros(OBS))
    draw = agent.draw  # generators do not exist there either
    agent.draw = lambda *inputs: {k: v.to(device) for k, v in draw(*inputs).items()}
    with Devices():
        for _ in range(args.policy_delay):
            info = agent.update(buffer.sample(32, None), torch.Generator())
    assert "losses/actor" in info and {value.device for value in info.values()} == {device}
    assert not mixed


@pytest.mark.parametrize("script", SCRIPTS)
def test_denormal_numbers_are_flushed(script):
    """Those that Adam leaves of gradients that are zero from some time on."""
    module = importlib.import_module(script.removesuffix(".py"))
    tiny = torch.full((64,), 1e-30)
    torch.set_flush_denormal(False)
    assert (tiny * 1e-10 != 0).all()
    module.choose_device(module.Args(device="cpu"))
    assert (tiny * 1e-10 == 0).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_that_lie_in_padded_memory(script):
    """As compiled ones do on CUDA, whose fused Adam refuses them; that of the CPU takes the padding
    for numbers."""

    def updated(copies):
        agent, update = make(script)
        plain = agent.gradients

        def gradients(*inputs):
            values, info = plain(*inputs)
            return [torch.stack([value] * copies, -1)[..., 0] for value in values], info

        agent.gradients = gradients
        for _ in range(4):  # two of them of the actor and the temperature
            update()
        return list(agent.parameters())

    plain, padded = updated(1), updated(2)
    assert all(torch.equal(a, b) for a, b in zip(plain, padded))
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in padded)


@pytest.mark.parametrize("script", ALGORITHMS)
def test_every_loss_is_one_graph(script):
    """Or a run would end at its first compiled update. The backend "eager" takes the graph apart
    again, so the numbers are those of plain updates."""
    (plain, update), (agent, update_compiled) = make(script), make(script)
    agent.gradients = torch.compile(agent.gradients, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=1000):
        for _ in range(2):  # the second one with an actor update
            update()
            info = update_compiled()
    assert "losses/actor" in info
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, msg=name)


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_updates_on_cuda(script):
    """The compiler pads numbers of inputs that are no multiples of four, where it finds that faster;
    here always."""
    from torch._inductor import config

    torch._dynamo.reset()
    infos = []
    for compiled in (False, True):
        _, update = make(script, compiled, "cuda")
        with config.patch(force_shape_pad=True):
            infos.append([update() for _ in range(4)])
    for plain, compiled in zip(*infos):
        for name, value in plain.items():
            assert torch.allclose(value, compiled[name], rtol=1e-3, atol=1e-4), name


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_synchronisation_on_cuda(script):
    _, update = make(script, device="cuda")
    update(), update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(), update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_kept_from_update_to_update(script):
    """As many tensors, of as many bytes, live after 40 updates as after 10."""
    agent, update = make(script)

    def live():
        gc.collect()
        kinds = torch.Tensor, torch.nn.Parameter  # but no tracer's fake
        tensors = [x for x in gc.get_objects() if type(x) in kinds]
        return len(tensors), sum(x.nbytes for x in tensors)

    for _ in range(10):
        update()
    before = live()
    for _ in range(30):
        update()
    assert live() == before and agent.n_updates == 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_once(script):
    """A graph for each loss and one for the trial, without a break, and none anew later."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    agent, update = make(script, compiled=True)
    for _ in range(4):
        update()
    graphs = len(agent.optimizers) + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for _ in range(6):
        update()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_schedule_does_not_compile_anew_at_every_update(monkeypatch):
    """A subclass may use n_updates in a loss."""
    module = importlib.import_module("crossq_sac")

    class Agent(module.Agent):
        def critic_loss(self, batch, draws):
            loss, info = super().critic_loss(batch, draws)
            return loss * min(1.0, self.n_updates / 1000), info

    monkeypatch.setattr(module, "Agent", Agent)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, update = make("crossq_sac.py", compiled=True)
    for _ in range(6):
        update()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(6):
        update()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
