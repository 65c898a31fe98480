"""Entry point: `python cli.py fit --config experiments/ablation_pos.yaml`."""

import atexit
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from framework.cli import main


def end(code: int) -> NoReturn:
    """Ends the process, as the processes of a study's runs end.

    Python itself would look for cycles among a million objects before, for longer than many commands take.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
