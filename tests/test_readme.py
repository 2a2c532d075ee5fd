"""What the READMEs show is what the files hold: code, links, flags."""

import re

import pytest
from conftest import ROOT
from test_run import TINY, main, restored  # noqa: F401

READMES = ["README.md", "benchmark/README.md", "benchmark/results/README.md"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_joint_pass_is_the_scripts():
    idea, *_ = code_blocks("python")
    assert idea in (ROOT / "crossq_sac.py").read_text() and len(idea.splitlines()) <= 10


def test_the_policy_from_python(main):  # noqa: F811
    assert main(*TINY, "--run-name", "NAME", "--total-timesteps", 20) == 0
    _, policy, _ = code_blocks("python")
    scope = {}
    exec(policy, scope)
    assert abs(scope["action"]).max() <= 1
    scope["env"].step(scope["action"])


def test_an_algorithm_of_your_own(main):  # noqa: F811
    *_, own = code_blocks("python")
    scope = {"__name__": "crossq_sac"}  # stands for a file of one's own
    exec(own, scope)
    assert main(*TINY, "--run-name", "a", Agent=scope["Agent"]) == 0


def test_an_algorithm_of_your_own_is_a_program(run_script, tmp_path):
    """It lies in a folder of its own, and is measured as the scripts are."""
    *_, own = code_blocks("python")
    (tmp_path / "mine.py").write_text(own)
    command = ["mine.py", *TINY, "--total-timesteps", 50, "--run-name", "a"]
    end = run_script("benchmark/probe.py", *command)
    assert end.returncode == 0 and "q_bias/mean" in end.stdout, end.stderr


def anchors(path):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES)
def test_links(readme):
    """Every file and every heading that a link names is there."""
    path = ROOT / readme
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("readme", READMES[:2])
def test_flags(readme):
    """Every flag that the text names is one of a script's or of a program's."""
    programs = [*ROOT.glob("*.py"), *ROOT.glob("benchmark/**/*.py"), ROOT / "benchmark/run.sh"]
    known = "".join(program.read_text() for program in programs)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", (ROOT / readme).read_text())):
        name = flag.removeprefix("no-").replace("-", "_")
        assert flag in known or name in known or flag in ("check", "logdir"), flag
