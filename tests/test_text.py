"""The scripts and READMEs as text: what is shared, how long and how dense, links and quotations."""

import ast
import difflib
import re

import pytest
from conftest import ROOT, SCRIPTS, TINY

READMES = [path.relative_to(ROOT) for path in (ROOT / "README.md", *ROOT.glob("benchmark/**/*.md"))]
DIFFERENT = {  # what two scripts define in different words, and why
    "Args": "own hyper-parameters and defaults",
    "MLP": "sac_baseline.py has no normalisation; CrossQ + WN has batch norm and projects its weights",
    "MLP.__init__": "the same",
    "MLP.forward": "sac_baseline.py has no normalisation",
    "Agent": "the algorithm",
    "Agent.__init__": "TD3 has no temperature, two scripts have target networks, WN has AdamW",
    "Agent.policy": "TD3's is deterministic",
    "Agent.critic_loss": "the joint pass, target networks, and TD3's smoothing",
    "Agent.actor_loss": "train and eval mode of batch norm; TD3's loss",
    "Agent.update": "target networks; TD3's actor update draws no noise; projections of CrossQ + WN",
    "Agent.act": "eval mode of batch norm; TD3's exploration noise",
}


def text_of(script):
    return (ROOT / script).read_text()


def definitions(script):
    """Source text, decorators and all, of every top-level class, function and constant, and of a
    class's methods."""
    source = text_of(script)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), ast.get_source_segment(source, node)
        for part in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(part, ast.ClassDef | ast.FunctionDef):
                start = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
                name = part.name if part is node else f"{node.name}.{part.name}"
                yield name, str(source.splitlines()[start - 1 : part.end_lineno])


def test_definitions_are_the_same_text():
    """But for those that differ on purpose; a needless entry of that list fails too."""
    texts = {}
    for script in SCRIPTS:
        for name, text in definitions(script):
            texts.setdefault(name, set()).add(text)
    assert {name for name, versions in texts.items() if len(versions) > 1} == DIFFERENT.keys()


def test_imports_are_the_same():
    """But for copy (of SAC's critic), math (of densities) and the optimiser. No script imports
    another."""
    common = set()
    for script in SCRIPTS:
        lines = re.findall(r"^ *(?:import|from) .*$", text_of(script), re.M)
        own = ("import copy", "import math", "from torch.optim ")
        common.add("\n".join(line for line in lines if not line.startswith(own)))
    (imports,) = common
    assert "import torch" in imports and not re.search("crossq|baseline", imports)


@pytest.mark.parametrize("script", SCRIPTS)
def test_import_has_no_side_effect(script):
    docstring, *body, last = ast.parse(text_of(script)).body
    allowed = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
    assert all(isinstance(node, allowed) for node in body)
    assert isinstance(docstring.value, ast.Constant)
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"


def test_inline_metadata_is_requirements_txt():
    """PEP 723: `uv run SCRIPT` installs what requirements.txt does, less pytest. The text is the
    same in every script."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    pattern = re.compile(r"^# /// script\n((?:#.*\n)+)# ///$", re.M)
    (block,) = {pattern.search(text_of(script)).group(1) for script in SCRIPTS}
    metadata = tomllib.loads(block.replace("# ", ""))
    wanted = {line for line in text_of("requirements.txt").splitlines() if "pytest" not in line}
    assert metadata["requires-python"] == ">=3.10" and {*metadata["dependencies"]} == wanted


def count_nodes(tree):
    left_out = ast.expr_context | ast.operator | ast.cmpop | ast.boolop | ast.unaryop
    return sum(not isinstance(node, left_out) for node in ast.walk(tree))


@pytest.mark.parametrize("script", SCRIPTS)
def test_length_and_density(script):
    """At most 470 lines of 100 columns, 22 500 characters, functions of 75 lines; on average 52
    characters and 7 syntax nodes in a line. CrossQ + WN has more to show."""
    text = text_of(script)
    lines, tree = text.splitlines(), ast.parse(text)
    full = [line.strip() for line in lines if line.strip()]
    most = (490, 23_300) if script == "crossq_wn_highutd.py" else (470, 22_500)
    assert len(lines) <= most[0] and len(text) <= most[1]
    assert max(map(len, lines)) <= 100
    assert round(sum(map(len, full)) / len(full), 1) <= 52
    assert round(count_nodes(tree) / len(full), 1) <= 7
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            assert len([line for line in body if line.strip()]) <= 75, node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_and_used(script):
    """Each field of Args has a comment, which tyro shows, and is read somewhere as args.NAME."""
    text, tree = text_of(script), ast.parse(text_of(script))
    args = next(node for node in tree.body if getattr(node, "name", "") == "Args")
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in attributes if re.search(r"\bargs$", ast.unparse(node.value))}
    for field in args.body:
        name = field.target.id
        assert name in read, name
        told = "cuda.is_available()" if name == "device" else "  # "
        assert told in text.splitlines()[field.lineno - 1], name


def test_the_diff_from_sac_to_crossq_is_short():
    """`diff sac_baseline.py crossq_sac.py` is the paper."""
    a, b = (text_of(script).splitlines() for script in ("sac_baseline.py", "crossq_sac.py"))
    lines = list(difflib.unified_diff(a, b, n=0, lineterm=""))[2:]
    assert 0 < sum(line[0] in "+-" for line in lines) < 110


def anchors(path):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_links(readme):
    """Every file and every heading that a link or a picture names is there."""
    path = ROOT / readme
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", path.read_text()):
        target = "".join(target)
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            if re.fullmatch("L[0-9]+", anchor):  # the only line that is linked
                assert "def critic_loss" in there.read_text().splitlines()[int(anchor[1:]) - 1]
            else:
                assert not anchor or anchor in anchors(there), target


def test_the_quoted_loss_is_the_scripts():
    """A block of the README with the joint pass is in crossq_sac.py, but for its indentation."""
    blocks = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    quoted = [block for block in blocks if "both_obs = torch.cat" in block]
    lines = [line.strip() for line in text_of("crossq_sac.py").splitlines() if line.strip()]
    for block in quoted:
        wanted = [line.strip() for line in block.splitlines() if line.strip()]
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), block
    assert quoted


def test_the_readmes_own_programs_run(main, run_script, tmp_path):
    """The policy from Python, and a subclass as a program that probe.py measures."""
    _, policy, own = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    main(*TINY, "--run-name", "NAME")
    scope = {}
    exec(policy, scope)
    assert abs(scope["action"]).max() <= 1
    (tmp_path / "mine.py").write_text(own)
    end = run_script("benchmark/probe.py", "mine.py", *TINY, "--run-name", "mine")
    assert end.returncode == 0, end.stderr
    assert "q_bias/mean" in (tmp_path / "runs/mine/probe.csv").read_text()
