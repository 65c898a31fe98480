"""Errors that a user can mend: one line with the config path or file, what was got, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A mistake in a config, an option or a file. Ends a command with this one line and exit code 2."""


def suggest(got: str, allowed: Iterable[str], limit: int = 12) -> str:
    """`did you mean 'x'?`, with the allowed names behind it where they are few; empty where there are none."""
    allowed = sorted(set(allowed))
    lower = {name.lower(): name for name in reversed(allowed)}
    near = difflib.get_close_matches(got.lower(), lower, n=1, cutoff=0.6)
    parts = [f"did you mean {lower[near[0]]!r}?"] if near else []
    if allowed and (len(allowed) <= limit or not near):
        shown = allowed[: 2 * limit]
        parts.append(f"allowed: {', '.join(shown)}{', …' if len(shown) < len(allowed) else ''}")
    return "; ".join(parts) or "nothing is allowed here"
