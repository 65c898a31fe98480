"""A net in a process of its own, where nothing is set: as it runs in a script that somebody writes.

In the process that measures, the C library is told to keep freed memory, from which every net there gains.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from framework.bench.harness import repeated
from framework.bench.memory import fresh_processes
from framework.bench.nets import Entrant, Form, Setting, formed, step
from framework.errors import ConfigError


class Script:
    """Takes its turns in another process, and gives the seconds that passed there.

    Args:
        entrant: the net, with the weights that `compare.make` gives the first one.
        form: how it is run.
        setting: what is timed.

    Raises:
        ConfigError: the process was killed, as the system does where memory runs out.
    """

    def __init__(self, entrant: Entrant, form: Form, setting: Setting) -> None:
        context = fresh_processes()
        self._name = entrant.name
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, entrant, form, setting), daemon=True)
        self._process.start()
        theirs.close()
        try:
            logits = self._receive()
        except BaseException:
            self.close()
            raise
        self._logits = None if logits is None else torch.from_numpy(logits)

    def __call__(self, count: int) -> float:
        """Seconds for `count` acts."""
        with suppress(BrokenPipeError):  # told of where nothing comes back
            self._ours.send(count)
        return self._receive()

    def last(self) -> Any:
        """The logits at inference."""
        return self._logits

    def close(self) -> None:
        self._ours.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            found = self._ours.recv()
        except EOFError as error:
            raise ConfigError(f"{self._name}: the process that ran it was killed; give a smaller batch") from error
        if isinstance(found, Exception):
            raise found
        return found


def _serve(pipe: Connection, entrant: Entrant, form: Form, setting: Setting) -> None:
    """Sends the logits or None, then for each number that comes the seconds of so many acts, or the error of either."""
    from framework.bench.compare import make

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at Ctrl-C it ends without a word
    torch.set_num_threads(setting.threads)
    with suppress(EOFError, BrokenPipeError):
        try:
            net = formed(make([entrant]).nets[entrant.name], form, setting)
            act = step(net, form, setting, entrant.image)
            made = act()
            pipe.send(made.float().numpy() if setting.mode == "inference" else None)
            while True:
                pipe.send(setting.stopwatch(repeated(act, pipe.recv())))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # whatever the net raises is raised where it was asked for
            pipe.send(error)
