"""How many examples Hypothesis tries: all in two environments, a tenth in the others, where only the versions differ."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    return max(10, count // 10) if os.environ.get("FEW_EXAMPLES") else count
