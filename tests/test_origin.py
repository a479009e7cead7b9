"""Versions, the revision of the user's repository, hashes of profiles."""

import subprocess
from pathlib import Path

import partition as pt
from partition.origin import hashes, made, revision


def test_the_revision_of_a_repository(tmp_path: Path) -> None:
    assert revision(str(tmp_path)) == "none"
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "f").write_text("1")
    revision.cache_clear()
    clean = revision(str(tmp_path))
    assert len(clean) >= 7 and not clean.endswith("+")
    subprocess.run(["git", "-C", str(tmp_path), "add", "f"], check=True)
    revision.cache_clear()
    assert revision(str(tmp_path)) == clean + "+"


def test_a_hash_changes_with_a_number_of_its_profile_alone() -> None:
    cluster = pt.cluster("trn2_efa_cs3")
    before, after = hashes(cluster), hashes(cluster.replace({"cs3.price": "1 $/h"}))
    assert before.keys() == after.keys() and [k for k in before if before[k] != after[k]] == ["cs3"]
    assert made(cluster, seed=3)["seed"] == 3 and made()["versions"]["working_folder_git"]
