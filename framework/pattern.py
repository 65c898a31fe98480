"""The stacking language: `(ncb*4 ntb)*2`. Names, parentheses, `*count` and white space; nothing else.

Arguments of blocks belong to `blocks:`, where they have types and paths.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from framework.errors import ConfigError, suggest

MOST_BLOCKS = 4096
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<times>\*\s*(?P<count>\d+))|(?P<sign>[()]))")


def expand(pattern: str, names: Collection[str], where: str) -> list[str]:
    """The names of a pattern in order, every repetition written out.

    Args:
        pattern: for example `ncb*2 (tnt se)*3`.
        names: the names that may stand in it.
        where: config path of the pattern, for messages.

    Raises:
        ConfigError: bad syntax or an unknown name, with its column, or more than `MOST_BLOCKS` blocks.
    """

    def error(at: int, message: str) -> ConfigError:
        shown = pattern if len(pattern) <= 80 else f"…{pattern[max(at - 20, 0) : at + 20]}…"
        return ConfigError(f"{where}: {message} at column {at + 1} of {shown!r}")

    stack: list[list[str]] = [[]]  # the open groups
    opened: list[int] = []
    last: list[str] | None = None  # what a following *count repeats
    at = 0
    while pattern[at:].strip():
        match = _TOKEN.match(pattern, at)
        if match is None:
            at += len(pattern[at:]) - len(pattern[at:].lstrip())
            what = "'*' needs a count behind it" if pattern[at] == "*" else f"unexpected {pattern[at]!r}"
            raise error(at, what)
        start = match.end() - len(match[0].lstrip())
        if name := match["name"]:
            if name not in names:
                raise error(start, f"unknown block {name!r} ({suggest(name, names)})")
            last = [name]
            stack[-1] += last
        elif match["times"]:
            if last is None:
                raise error(start, "'*' needs a name or a group before it")
            count = int(match["count"]) if len(match["count"]) < 9 else MOST_BLOCKS + 1  # int() refuses long texts
            if count < 1:
                raise error(start, "a count must be at least 1,")
            if len(last) * count > MOST_BLOCKS:
                raise error(start, f"more than {MOST_BLOCKS} blocks")
            stack[-1] += last * (count - 1)
            last = None
        elif match["sign"] == "(":
            stack.append([])
            opened.append(start)
            last = None
        else:
            if not opened:
                raise error(start, "')' closes nothing")
            if not stack[-1]:
                raise error(start, "an empty group")
            opened.pop()
            last = stack.pop()
            stack[-1] += last
        if sum(map(len, stack)) > MOST_BLOCKS:
            raise error(start, f"more than {MOST_BLOCKS} blocks")
        at = match.end()
    if opened:
        raise error(opened[-1], "'(' is never closed")
    return stack[0]
