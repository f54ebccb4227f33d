"""The docs name every metric, no flag that does not exist, and no file that is not there."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

import dream_spi
import evaluate
import ppo_atari_envpool_xla_jax_scan as ppo
from benchmarks import gpu_kernels, profile_update, throughput
from experiments import (
    confounding_gridworld,
    gridworld_sensitivity,
    guarantees,
    heatmap,
    report,
    representations,
    run,
    seeds,
    tune,
)
from experiments.study.plan import plan
from tests.commands import ROOT
from utils.runs.flags import check_flags, parse_command, parse_flags

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*ROOT.glob("*.py"), *(path for name in ("utils", "networks", "envs") for path in (ROOT / name).rglob("*.py"))]
PROGRAMS = (dream_spi, ppo, evaluate, report, run, seeds, representations, confounding_gridworld, guarantees)
PROGRAMS += (tune, heatmap, gridworld_sensitivity, throughput, profile_update, gpu_kernels)
# of other programs (uv, pytest, ruff, chromium), and of examples
OTHERS = {"extra", "group", "no-project", "with-requirements", "with", "check", "write", "resume", "my-coef", "logdir", "help"}


def names_of_metrics():
    text = "\n".join(path.read_text() for path in SOURCES)
    found = set(re.findall(r'"((?:losses|charts|spi|dreams)/[a-z_]+)"', text))
    assert len(found) > 35
    return found


def test_every_metric_is_documented():
    page = (ROOT / "docs/logging.md").read_text()
    assert not [name for name in names_of_metrics() if f"`{name}`" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_exist(page):
    declared = {field.name for program in PROGRAMS for field in dataclasses.fields(program.Args)}
    declared.add("game")  # of simplified/deep_spi.py
    typed = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", page.read_text())) - OTHERS
    typed = {flag.replace("-", "_") for flag in typed if not flag.startswith("xla_")}
    assert not [flag for flag in typed if flag not in declared and flag.removeprefix("no_") not in declared]


VALUES = {"seed": "1", "rate": "1e-3", "mode": "none", "game": "Breakout"}


def commands_of(page):
    """The script of each command line in a page, and the words after it, with a value for each loop variable."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$([a-z]+)", lambda x: VALUES[x[1]], line), comments=True)
            places = [i for i, word in enumerate(words) if re.fullmatch(r"((experiments|benchmarks)/)?[a-z_]+\.py", word)]
            if places and words[0] != "diff":
                rest = words[places[0] + 1 :]
                end = next((i + 1 for i, word in enumerate(rest) if word.endswith(";")), len(rest))
                yield words[places[0]], [word.removesuffix(";") for word in rest[:end]]


@pytest.mark.minatar
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_accepted(page, tmp_path):
    """Each program takes the flags that the docs give it. Examples with files that a reader writes are left out."""
    for script, words in commands_of(page):
        if "my_" in " ".join([script, *words]) or "--help" in words or "${" in " ".join(words):
            continue
        split = words.index("--") if "--" in words else len(words)
        own, flags = words[:split], words[split + 1 :]
        args_type = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Args
        if "/" not in script and script != "evaluate.py":
            check_flags(parse_flags(args_type, own))
            continue
        args = parse_command(args_type, own)
        if script == "experiments/run.py" and not args.status:
            plan(args.scripts, args.env_ids, [args.start_seed], flags, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_scripts_in_commands_exist():
    for page in PAGES:
        for script in re.findall(r"uv run (?:--\S+ (?!\S+\.py)\S+ )*(?:--\S+ \S+ )*([\w/]+\.py)", page.read_text()):
            assert (ROOT / script).exists() or script == "my_spi.py", f"{page.name}: {script}"


def test_the_readme_is_short():
    assert len(Path(ROOT / "README.md").read_text().splitlines()) <= 120
