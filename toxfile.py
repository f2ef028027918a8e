"""Shows tox the interpreters in pyenv's folder, which need not be on the PATH. They come last."""

from __future__ import annotations

import os
import sys
from pathlib import Path

roots = {
    Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser(),
    *(p.parent.parent for p in [Path(sys.base_prefix)]),
}
found = [str(path) for root in roots for path in sorted(root.glob("versions/3.*/bin"))]
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *found])
