"""Output files are checked before the work, by every tool."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import checkpoints as save_benchmark
from benchmarks import profile_update, throughput
from experiments import confounding_gridworld, guarantees, report, representations, seeds
from experiments import run as launching
from experiments.study.records import COLUMNS, RunRecord, read_runs
from utils.files import write_csv
from utils.runs.flags import GRIDWORLD, UsageError
from utils.runs.folder import locate
from utils.runs.load_run import load_run
from utils.runs.outputs import check_output, expand

TOOLS = (confounding_gridworld, guarantees, report, representations, seeds, throughput)
NEEDED = {"report": {"runs": ("runs",)}, "representations": {"runs": (Path("runs"),)}, "seeds": {"env_ids": (GRIDWORLD,)}}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize(
    "path, said", [("~nobody-at-all/x", "~nobody-at-all is no home folder"), ("/proc/x", "cannot be written")]
)
def test_an_output_that_cannot_be_written_is_known_before_the_work(tool, path, said, monkeypatch):
    own = NEEDED.get(tool.__name__.rpartition(".")[2], {})
    kind = type(tool.Args.output)
    with pytest.raises(UsageError, match=f"--output {path}.*{said}"):
        tool.main(tool.Args(output=str(path) if kind is str else Path(path), **own))


def test_a_file_is_one_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/a.csv", "--output") == tmp_path / "a.csv" and list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("of before")
    assert check_output(tmp_path / "old", "--output").read_text() == "of before"
    for wrong, said in (
        ("", "is not a file name"),
        (tmp_path / "..", "is not a file name"),
        (tmp_path, "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (tmp_path / "no" / "a.csv", "folder .*no does not exist; create it first"),
        (tmp_path / "old" / "a.csv", "folder .*old does not exist"),
        (tmp_path / ("a" * 300), "cannot be written .File name too long"),
    ):
        with pytest.raises(UsageError, match=f"--output .*{said}"):
            check_output(wrong, "--output")
    assert check_output(tmp_path / "new" / "a.csv", "--output", make_parent=True).parent.is_dir()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(UsageError, match="a.csv: cannot be written .Permission denied.; name another file with --output"):
        check_output(tmp_path / "a.csv", "--output")


def test_a_home_that_does_not_exist_is_a_mistake():
    assert expand("~/a") == Path.home() / "a"
    for call in (
        lambda path: load_run(path),
        lambda path: locate(SimpleNamespace(logdir=path, resume="auto", run_name="a"), "x"),
        lambda path: locate(SimpleNamespace(resume=path), "x"),
        lambda path: launching.main(launching.Args(logdir=Path(path), status=True), []),
        lambda path: launching.main(launching.Args(scripts=(f"{path}.py",), dry_run=True), []),
    ):
        with pytest.raises(UsageError, match="~nobody-at-all is no home folder"):
            call("~nobody-at-all/a")


@pytest.mark.parametrize(
    "tool, flags, said",
    [
        (seeds, {"env_ids": ()}, "--env-ids: name at least one"),
        (seeds, {"vary": ("learning-rate", "1e-3", "0.001")}, "--vary learning-rate 1e-3 0.001: has duplicates; remove them"),
        (seeds, {"flags": "--gamma '0.9"}, "--flags .*no closing quotation"),
        (confounding_gridworld, {"gridworld_n_path": 1}, "--gridworld-n-path 1"),
        (confounding_gridworld, {"gridworld_epsilon": 7.0}, "--gridworld-epsilon 7"),
        (confounding_gridworld, {"total_timesteps": 1}, "--total-timesteps 1"),
        (confounding_gridworld, {"seeds": (1, 2**40)}, f"--seed {2**40}"),
        (confounding_gridworld, {"algorithms": ("PPO", "PPO")}, "--algorithms: name at least one, and each once"),
        (guarantees, {"total_timesteps": 0}, "--total-timesteps 0"),
        (guarantees, {"seeds": (2**40,)}, f"--seed {2**40}"),
        (representations, {"runs": ()}, "no runs"),
        (representations, {"runs": (Path("wandb:a/b"),)}, "wandb:a/b: networks are not stored in W&B"),
        (throughput, {"env_ids": ()}, "--env-ids: name at least one"),
        (throughput, {"rounds": 0}, "--rounds 0"),
        (profile_update, {"updates": 0}, "--updates 0"),
        (save_benchmark, {"rounds": 0}, "--rounds 0"),
        (save_benchmark, {"updates": 2}, "--updates 2"),
        (save_benchmark, {"script": "nothing.py"}, "--script nothing.py: no such file"),
    ],
)
def test_mistakes_of_tools(tool, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        tool.main(tool.Args(**flags))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="--settings .*no closing quotation"):
        throughput.parse_setting("ppo '", "Pong-v5")


def test_seeds_prints_scores_before_it_writes(tmp_path, monkeypatch, capsys):
    """The disk fills up during the training."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ones = np.ones((2, 2), int)
    returns = seeds.Returns(np.full((2, 2), 7.0), ones, ones.astype(bool))
    monkeypatch.setattr(seeds, "train", lambda module, args, runs: returns)
    monkeypatch.setattr(seeds, "write_csv", refuse)
    with pytest.raises(OSError, match="No space left"):
        seeds.main(seeds.Args(seeds=(1, 2), output=tmp_path / "a.csv", **NEEDED["seeds"]))
    assert "7.00 +- 0.00 (2 seeds)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["read_bytes", "is_file"])
def test_an_input_that_cannot_be_read_is_named(method, tmp_path, monkeypatch):
    """A colleague's table, and a table in a colleague's folder."""
    path = tmp_path / "t.csv"
    path.write_text("script\n")

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(UsageError, match="t.csv: cannot be read .Permission denied."):
        read_runs([str(path)], "charts/episodic_return")


def test_a_model_that_cannot_be_read_is_skipped(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    run = RunRecord("a", "ppo", "CartPole-v1", "", 1, 10, np.array([10]), np.ones(1), np.ones(1))
    monkeypatch.setattr(representations, "finished_runs", lambda _: [run])
    monkeypatch.setattr(representations, "read_run", refuse)
    with pytest.raises(UsageError, match="no run could be measured"):
        representations.main(representations.Args((tmp_path,), tmp_path / "a.csv"))
    assert "*** a: Permission denied; skipped ***" in capsys.readouterr().out


def test_seeds_reads_a_table_that_a_spreadsheet_saved(tmp_path):
    row = ("ppo", "Breakout-MinAtar", "", "1", "100", "100", "2.5", "3")
    write_csv(tmp_path / "a.csv", COLUMNS, [row])
    (tmp_path / "b.csv").write_bytes((tmp_path / "a.csv").read_text().replace("\n", "\r\n").encode("utf-8-sig"))
    assert seeds.read_table(tmp_path / "b.csv") == [dict(zip(COLUMNS, row, strict=True))]
    for wrong in (b"\xff\xfe1", b"a,b\n1,2\n"):
        (tmp_path / "c.csv").write_bytes(wrong)
        with pytest.raises(UsageError, match="--output: would replace .*c.csv, which has other columns"):
            seeds.read_table(tmp_path / "c.csv")
    whole = (tmp_path / "a.csv").read_text()
    for damaged in (
        whole[:-25],
        whole[:-3],
        whole.replace("2.5", "2.5.1"),
        whole.replace("2.5", "1,2.5"),
        whole.replace("100,100", "100,"),
    ):
        (tmp_path / "d.csv").write_text(damaged)
        with pytest.raises(UsageError, match="--output .*d.csv: line 2 is damaged"):
            seeds.read_table(tmp_path / "d.csv")
