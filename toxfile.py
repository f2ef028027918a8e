"""Lets tox find the interpreters in pyenv's folder, which need not be on the PATH. They come last."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # $HOME may be another folder
root = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
found = [str(path) for path in sorted(root.glob("versions/3.*/bin"))]
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *found])
