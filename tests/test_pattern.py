"""The stacking language."""

from __future__ import annotations

import pytest

from framework.errors import ConfigError
from framework.pattern import MOST_BLOCKS, expand

NAMES = ("ncb", "ntb", "a", "b", "c", "tnt_2")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", "a"),
        ("a b", "a b"),
        ("a*3", "a a a"),
        ("a*1", "a"),
        ("a*03", "a a a"),
        ("ncb*3 ntb", "ncb ncb ncb ntb"),
        ("(ncb*4 ntb)*2", "ncb ncb ncb ncb ntb ncb ncb ncb ncb ntb"),
        ("((a b)*2 c)*2", "a b a b c a b a b c"),
        ("(((a)))", "a"),
        ("(a)*2 (b)", "a a b"),
        ("a (b (c)*2)*2 a", "a b c c b c c a"),
        ("(a*2 b)*2 c*2", "a a b a a b c c"),
        ("(a)(b)", "a b"),
        ("a(b)c", "a b c"),
        ("tnt_2*2", "tnt_2 tnt_2"),
    ],
)
def test_repetitions_are_written_out(pattern: str, names: str) -> None:
    assert expand(pattern, NAMES, "here") == names.split()


@pytest.mark.parametrize("pattern", ["  a*2   b ", "a * 2 b", "a* 2\tb", "a\n*\n2\nb", "( a ) * 2 b", "a *2(b)"])
def test_white_space_means_nothing(pattern: str) -> None:
    assert expand(pattern, NAMES, "here") == ["a", "a", "b"]


@pytest.mark.parametrize("pattern", ["", "   ", "\n"])
def test_nothing_is_no_block(pattern: str) -> None:
    assert expand(pattern, NAMES, "here") == []


@pytest.mark.parametrize(
    ("pattern", "column", "says"),
    [
        ("a*", 2, "needs a count"),
        ("a*b", 2, "needs a count"),
        ("a *-1", 3, "needs a count"),
        ("a*0", 2, "at least 1"),
        ("*3", 1, "needs a name or a group before it"),
        ("a*2*3", 4, "needs a name or a group before it"),
        ("(*2)", 2, "needs a name or a group before it"),
        ("()", 2, "empty group"),
        ("a ( )*2", 5, "empty group"),
        (")", 1, "closes nothing"),
        ("a*2)", 4, "closes nothing"),
        ("(a", 1, "never closed"),
        ("(a (b)", 1, "never closed"),
        ("a (b (c)", 3, "never closed"),
        ("a, b", 2, "unexpected ','"),
        ("a  -b", 4, "unexpected '-'"),
        ("a 3", 3, "unexpected '3'"),
        ("a{dim: 3}", 2, "unexpected '{'"),
        ("a*2.5", 4, "unexpected '.'"),
        ("é", 1, "unexpected 'é'"),
    ],
)
def test_an_error_points_at_its_column(pattern: str, column: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(pattern, NAMES, "model.backbone.pattern")
    message = str(caught.value)
    assert message.startswith("model.backbone.pattern: ")
    assert says in message
    assert message.endswith(f"at column {column} of {pattern!r}")
    assert "\n" not in message


@pytest.mark.parametrize(("pattern", "column", "near"), [("ncb nbt", 5, "ntb"), ("  (NCB)*2", 4, "ncb")])
def test_an_unknown_name_is_suggested(pattern: str, column: int, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown block .* \\(did you mean {near!r}\\?.* at column {column} of"):
        expand(pattern, NAMES, "here")


def test_an_unknown_name_without_a_near_one_names_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown block 'zzz' \(allowed: a, b\) at column 1"):
        expand("zzz", ("a", "b"), "here")
    with pytest.raises(ConfigError, match="there are none"):
        expand("zzz", (), "here")


@pytest.mark.parametrize(
    "pattern", ["a*4097", "(a*2000 b)*3", "a*4000 b*97", f"a*{'9' * 5000}", f"{'(' * 40}a{'*10)' * 40}", "a " * 5000]
)
def test_the_size_is_capped_without_hanging(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"more than {MOST_BLOCKS} blocks") as caught:
        expand(pattern, NAMES, "here")
    assert len(str(caught.value)) < 300


def test_the_cap_itself_is_allowed() -> None:
    assert len(expand(f"a*{MOST_BLOCKS}", NAMES, "here")) == MOST_BLOCKS
    assert len(expand("(" * 500 + "a" + ")" * 500, NAMES, "here")) == 1
