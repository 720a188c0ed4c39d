"""What is told of an error of another package."""

from __future__ import annotations

import pytest

from dlmctl.records.errors import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("too long\nand more"), "too long"),
        (ValueError("\n too long \nand more"), "too long "),
        (ValueError(), "ValueError"),
        (RuntimeError("\n"), "RuntimeError"),
        (OSError(2, "No such file", "a.json"), "[Errno 2] No such file: 'a.json'"),
        (ValueError("x" * 1000), "x" * 300),
    ],
)
def test_the_reason_is_one_short_line_and_never_empty(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
