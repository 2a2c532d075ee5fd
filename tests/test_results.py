"""The pages in benchmark/results say what the CSV files give. A row's first cell, or the column,
names folders of runs in backticks. A cell has a mean over seeds, or "mean (lowest to highest)"."""

import csv
import re
from statistics import mean, median

import pytest
from conftest import ROOT

RESULTS = ROOT / "benchmark" / "results"
PAGES = sorted(RESULTS.rglob("README.md"))
TASKS = {re.sub(r"^dm_control_|-v\d$", "", p.name) for p in RESULTS.rglob("*-v[0-9]")}


def rows(path, names=None):
    return list(csv.DictReader((line for line in open(path) if line[0] != "#"), names))


def grouped(records, value, *keys):
    groups = {}
    for row in records:
        groups.setdefault(" ".join(row[key] for key in keys), []).append(float(row[value]))
    return groups


def numbers(text):
    return [n.replace(" ", "") for n in re.findall(r"(?<![\w.])-?\d+(?: \d{3}\b)*(?:\.\d+)?", text)]


def agrees(number, value):
    return float(number) == float(f"{value:.{len(number.partition('.')[2])}f}")


def tables(page):
    """[header, *rows] of each table. A row is a list of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M):
        lines = [line.split("|")[1:-1] for line in table.splitlines()]
        yield [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


def value(path, header, step):
    """The mean of the evaluations around a step, as the published values are made."""
    if quantity := re.search(r"`((?:q_bias|critic|diagnostics)/[\w/]+)`", header):
        probe = "probe.csv" if path.stem == "evaluations" else f"{path.stem}.probe.csv"
        lines = rows(path.with_name(probe), ["step", "name", "value"])
        curve = grouped((row for row in lines if row["name"] == quantity[1]), "value", "step")
    else:
        curve = grouped(rows(path), "success" if "/myo" in str(path) else "return", "step")
    least = 8400 if re.match("(sbx-)?sac", path.parts[-3]) else 2000
    width = max(least * min(1, step / 20_000), step / 20)
    width = 0 if quantity or header.startswith("evaluation") else width
    return mean(mean(v) for at, v in curve.items() if abs(int(at) - step) <= width)


def runs(page, names, task):
    for folder in [page.parent / name for name in re.findall(r"`([\w./-]+)`", names)]:
        found = [p for p in folder.glob(f"*{task}-v?/*.csv") if p.stem.isdigit()]
        yield from found or folder.glob("evaluations.csv")


def published(text, task, step):
    """All numbers that the published files have of an algorithm, a task and a step."""
    algorithm = re.search(r"[A-Z][\w-]+(\(\w+\))?", text)[0]
    for row in (row for file in RESULTS.parent.glob("published/*.csv") for row in rows(file)):
        plain = [re.sub("hand|fixed|-v4|[^a-z]", "", t.lower()) for t in (row["env"], task)]
        alg = row.get("alg", "CrossQ")[: len(algorithm)]
        if (plain[0], row.get("env_step"), alg) == (plain[1], str(step), algorithm):
            yield from (float(v) for v in row.values() if re.fullmatch(r"-?[\d.]+", v or ""))


def check(page, head, row, header, cell):
    """Checks a cell. Returns whether it has a value."""
    named = dict(zip(head, row))
    words = row[0], named.get("task", ""), header, head[0]
    task = next((t for text in words for t in sorted(TASKS, key=len)[::-1] if t in text), "")
    found = [*runs(page, row[0], task)] or [*runs(page, header, task)]
    step = re.search(r"(\d+ \d{3}|\d{4})\b", named.get("steps", header))
    assert header != "seeds" or not found or cell == str(len(found)), row
    if not step or not cell or header in ("task", "steps", "seeds"):
        return False
    shown, step = numbers(cell), int(step[1].replace(" ", ""))
    if "published" in row[0] + header:
        text = cell if header.startswith("published,") else row[0] + header
        known = [*published(text.split("published ")[-1], task, step)]
        assert shown and all(any(agrees(n, v) for v in known) for n in shown), (row, header)
    else:
        values = [value(path, header, step) for path in found]
        expected = mean(values), min(values), max(values)
        assert len(shown) in (1, 3) and all(map(agrees, shown, expected)), (row, header, expected)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_and_length(page):
    lines = [(head, row) for head, *body in tables(page) for row in body]
    cells = [(*line, *pair) for line in lines for pair in list(zip(*line))[1:]]
    assert sum(check(page, *cell) for cell in cells) >= 2 or page.parent.name == "_falls"
    assert len(page.read_text().splitlines()) <= (220 if page.parent == RESULTS else 60)


def test_numbers_from_30_on_in_an_answer_stand_in_the_tables_of_its_page():
    for question, answer, link in next(t for t in tables(PAGES[0]) if t[0][0] == "question")[1:]:
        page = RESULTS / re.search(r"\]\(([^)#]*)", link)[1]
        known = numbers(" | ".join(cell for table in tables(page) for row in table for cell in row))
        assert {n for n in numbers(answer) if float(n) >= 30} <= {*known}, question


def test_falls_and_speeds():
    young = [r for r in rows(RESULTS / "_falls/episodes.csv") if 11 <= int(r["episode"]) <= 30]
    for setting in {row["setting"] for row in young}:
        runs = grouped((r for r in young if r["setting"] == setting), "on_back", "seed").values()
        upright = [share for run in runs if min(run) <= 0.02 for share in run]
        row = f"| `{setting}` | {len(upright)} | {sum(share > 0.02 for share in upright)} |"
        assert row in (RESULTS / "_falls/README.md").read_text()
    setting = "call contender width processes memory bf16".split()
    speeds = grouped(rows(RESULTS / "throughput.csv"), "steps_per_s", *setting).values()
    shown = re.findall(r"float\d\d \| (\d+\.\d) \(", (RESULTS / "throughput.md").read_text())
    assert sorted(shown) == sorted(f"{median(v):.1f}" for v in speeds)
