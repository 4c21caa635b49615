"""The commit in a run card says when the files were not those of the commit."""

import subprocess

from hovle_train.export import git_commit


def test_the_commit_of_the_folder_and_whether_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "recipe.yaml").write_text("1")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    commit = git_commit()
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "untracked").write_text("2")
    assert git_commit() == commit
    (tmp_path / "recipe.yaml").write_text("2")
    assert git_commit() == f"{commit}-dirty"
