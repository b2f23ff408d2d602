"""The commit that a run says it was trained with."""

import subprocess

import pytest

from lora_dist import environment


def git(folder, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    (folder / "lora_dist").mkdir(parents=True)
    (folder / "file").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", "file")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(environment, "CODE", folder)
    return folder


def test_the_commit_and_whether_files_differ_from_it(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert environment.git_commit() == commit
    (checkout / "untracked").write_text("")
    assert environment.git_commit() == commit
    (checkout / "file").write_text("2")
    assert environment.git_commit() == f"{commit}+changes"


def test_a_copy_says_what_it_was_copied_from(checkout, monkeypatch):
    (checkout / "git_commit").write_text("abc+changes\n")
    assert environment.git_commit() == "abc+changes"


def test_installed_inside_another_repository_it_has_none(checkout, monkeypatch, tmp_path):
    (checkout / "venv").mkdir()
    monkeypatch.setattr(environment, "CODE", checkout / "venv")
    assert environment.git_commit() is None
    monkeypatch.setattr(environment, "CODE", tmp_path)
    assert environment.git_commit() is None
