"""Errors that a user can mend: one line with the config path or file, what was got, and what would be right."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable


class ConfigError(Exception):
    """A mistake in a config, an option or a file. Ends a command with this one line and exit code 2."""


def suggest(got: str, allowed: Iterable[str], limit: int = 12) -> str:
    """`did you mean 'x'?`, with the allowed names behind it where they are few or none is near."""
    allowed = sorted(set(allowed))
    near = nearest(got, allowed)
    parts = [f"did you mean {near!r}?"] if near else []
    if allowed and (len(allowed) <= limit or not near):
        shown = allowed[: 2 * limit]
        parts.append(f"allowed: {', '.join(shown)}{', …' if len(shown) < len(allowed) else ''}")
    return "; ".join(parts) or "there are none"


def nearest(got: str, allowed: Iterable[str]) -> str:
    """The allowed name that `got` was probably meant to be, whatever its case; empty where none is near."""
    got, lower = got.lower(), {name.lower(): name for name in sorted(set(allowed), reverse=True)}

    def likeness(name: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, name, got).ratio(), name[:1] == got[:1]

    near = difflib.get_close_matches(got, lower, n=3, cutoff=0.6)
    return lower[max(near, key=likeness)] if near else ""


def reason(error: BaseException) -> str:
    """What a library or a class from outside raised, in one line: `KeyError: 'x' (my_block.py, line 12)`.

    The place is the last one outside torch, where most mistakes in a block's own code are.
    """
    text = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename] or frames
    at = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{at}"
