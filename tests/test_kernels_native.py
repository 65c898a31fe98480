"""The build of the C++ kernels, with a compiler of the test's own that says when it is called."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from blocks.kernels import inner, native
from tests.kernels import encoder

CAPABILITY = native.capability()
pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or a processor without a kernel")


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> Path:
    """A compiler that notes each library in the file given back, and does `act` for it with its target as `$out`."""
    script, calls = folder / "compiler", folder / "calls"
    script.write_text(f"#!/bin/sh\nfor out; do :; done\ncase $out in *.o) exit;; esac\necho called >> {calls}\n{act}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def built() -> Path:
    """The library of this machine."""
    found = native.library()
    assert found is not None
    return Path(found._name)


@pytest.mark.parametrize("capability", native.INSTRUCTIONS)
def test_the_sources_are_right_for_all_processors(capability: str) -> None:
    """Also for those that no other test has a library for."""
    if capability in (CAPABILITY, "AVX2"):
        pytest.skip("built elsewhere")
    sources = [str(source) for source in native.SOURCES.glob("*.cpp")]
    command = [*native.compiler(), *native.FLAGS, *native.INSTRUCTIONS[capability], "-fsyntax-only", *sources]
    subprocess.run(command, check=True)


def load_into(folder: Path, results: multiprocessing.Queue[str]) -> None:
    try:
        results.put("" if native.load(CAPABILITY, folder).inner_forward else "no function")
    except native.NoKernel as reason:
        results.put(str(reason))


def test_two_processes_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler(tmp_path, monkeypatch, f"sleep 0.3; cp {built()} $out")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=load_into, args=(tmp_path / "cache", results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["", ""]
    for process in processes:
        process.join()
    assert calls.read_text() == "called\n"
    load_into(tmp_path / "cache", results)
    assert calls.read_text() == "called\n"


def test_a_killed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiler(tmp_path, monkeypatch, "head -c 1000 /bin/sh > $out; kill -9 $$")
    for _ in range(2):
        with pytest.raises(native.NoKernel, match="exit -9"):
            native.load(CAPABILITY, tmp_path / "cache")
    assert calls.read_text() == "called\n" * 2
    assert not list((tmp_path / "cache").glob("**/*.so"))
    compiler(tmp_path, monkeypatch, f"cp {built()} $out")
    assert native.load(CAPABILITY, tmp_path / "cache").inner_forward


def test_the_key_changes_with_source_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpp"
    shutil.copytree(native.SOURCES, sources)
    monkeypatch.setattr(native, "SOURCES", sources)
    calls = compiler(tmp_path, monkeypatch, f"cp {built()} $out")
    for change in (lambda: None, lambda: (sources / "vector.h").write_text("//"),
                   lambda: monkeypatch.setattr(native, "FLAGS", ["-O1"])):  # fmt: skip
        change()
        native.load(CAPABILITY, tmp_path / "cache")
    assert calls.read_text() == "called\n" * 3


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (None, "there is no C.. compiler"),
        ('echo "inner.cpp:1: error: unknown flag" >&2; exit 1', "inner.cpp:1: error: unknown flag"),
        ("echo no library > $out", "invalid ELF header|file too short"),
    ],
    ids=["none", "fails", "breaks"],
)
def test_without_a_library_the_encoder_runs(
    act: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if act is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        compiler(tmp_path, monkeypatch, act)
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert native.library() is None
        assert not inner.serves(encoder(4, 12), torch.randn(3, 16, 12))
    finally:
        native.library.cache_clear()
    lines = [line for line in capsys.readouterr().err.splitlines() if "building" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("no CPU kernels for attention and the words of TNT")
    assert re.search(says, lines[0])


def test_an_error_in_the_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "cpp"
    shutil.copytree(native.SOURCES, sources)
    (sources / "vector.h").write_text("#error this is broken")
    monkeypatch.setattr(native, "SOURCES", sources)
    with pytest.raises(native.NoKernel, match=r"fails: .*vector.h.*this is broken") as found:
        native.load(CAPABILITY, tmp_path / "cache")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX"])
def test_older_processors_run_the_encoder(
    capability: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
    assert not capsys.readouterr().err
