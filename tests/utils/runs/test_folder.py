"""The commit in run.json: that of this project, or a reason why there is none."""

import os
import shutil
import subprocess

import pytest

from utils.runs import folder

UNKNOWN = {"git_commit": None, "git_dirty": None}
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(where, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=where, capture_output=True, text=True, check=True).stdout.strip()


def repository(where):
    """A repository with one commit, and that commit."""
    where.mkdir(parents=True)
    git(where, "init", "--quiet")
    (where / "code.py").write_text("1")
    git(where, "add", "code.py"), git(where, "commit", "--quiet", "--message", where.name)
    return git(where, "rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """A machine whose git has no settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


def test_the_commit_is_of_this_project_and_no_other(tmp_path, monkeypatch, capsys):
    ours, around = repository(tmp_path / "ours"), repository(tmp_path / "around")
    monkeypatch.setattr(folder, "ROOT", tmp_path / "ours")
    assert folder.git_commit() == {"git_commit": ours, "git_dirty": False}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "around" / ".git"))  # as in a hook of that repository
    assert ours != around and folder.git_commit()["git_commit"] == ours
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "ours" / "code.py").write_text("2")
    assert folder.git_commit() == {"git_commit": ours, "git_dirty": True}
    git(tmp_path / "ours", "worktree", "add", "--quiet", "../beside")
    (tmp_path / "link").symlink_to("beside")
    monkeypatch.setattr(folder, "ROOT", tmp_path / "link")
    assert folder.git_commit() == {"git_commit": ours, "git_dirty": False}
    unpacked = tmp_path / "around" / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr(folder, "ROOT", unpacked)
    assert folder.git_commit() == UNKNOWN
    (unpacked / ".git").mkdir()  # damaged: git goes on to the repository around it
    assert folder.git_commit() == UNKNOWN
    assert capsys.readouterr().out == ""


def said(capsys):
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to give files away")
def test_files_of_another_owner(tmp_path, monkeypatch, capsys):
    commit = repository(tmp_path / "their code")
    monkeypatch.setattr(folder, "ROOT", tmp_path / "their code")
    for path in (tmp_path / "their code", tmp_path / "their code" / ".git"):
        os.chown(path, 12345, 12345)
    assert folder.git_commit() == UNKNOWN
    line = said(capsys)
    assert "dubious ownership" in line
    command = line.partition("run: ")[2].removesuffix(" ***")
    subprocess.run(["bash", "-c", command], check=True)
    assert folder.git_commit()["git_commit"] == commit


def test_without_git_or_with_one_that_hangs(tmp_path, monkeypatch, capsys):
    repository(tmp_path / "ours")
    monkeypatch.setattr(folder, "ROOT", tmp_path / "ours")
    (tmp_path / "bin").mkdir()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert folder.git_commit() == UNKNOWN
    assert "git is not installed" in said(capsys)
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{path}")
    monkeypatch.setattr(folder, "GIT_SECONDS", 0.3)
    assert folder.git_commit() == UNKNOWN
    assert "takes longer than 0.3 s" in said(capsys)
