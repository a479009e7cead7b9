"""Models and profiles of the package are found where somebody else's `models/` and `device_profiles/` stand first."""

import os
import subprocess
import sys
from pathlib import Path

from partition.shipped import ROOT, shipped


def test_ours_is_the_plain_module_where_nothing_hides_it() -> None:
    import models.llama

    assert shipped("models.llama") is models.llama and (ROOT / "models").is_dir()


def test_a_folder_of_the_same_name(tmp_path: Path) -> None:
    for name in ("models", "device_profiles"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = 1\n")
    (tmp_path / "models" / "llama.py").write_text("raise RuntimeError('another llama')\n")
    (tmp_path / "own.py").write_text("import models\nimport numpy as np\n\n\ndef make():\n    assert models.MINE == 1\n    return (lambda w, x: x @ w), (np.eye(4, dtype=np.float32), np.ones((2, 4), np.float32))\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for model in ("tiny", "own:make"):
        done = subprocess.run([sys.executable, "-m", "partition", "check", model, "--cluster", "trn2_efa_cs3"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0 and "EQUAL BIT FOR BIT" in done.stdout, done.stderr
