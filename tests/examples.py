"""How many examples Hypothesis tries: all in two environments, and a tenth in those that differ in versions only."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    return max(10, count // 10) if os.environ.get("FEW_EXAMPLES") else count
