"""What an installation holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "rustllama"


def _files(package: Path) -> set[str]:
    return {str(path.relative_to(package)) for path in package.rglob("*.*") if "__pycache__" not in path.parts}


def test_every_file_of_the_package_is_installed(tmp_path: Path) -> None:
    code = "import rustllama; print(rustllama.__path__[0])"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("rustllama is not installed in this environment")
    assert _files(SOURCE) <= _files(Path(done.stdout.strip()))
