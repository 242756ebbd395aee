"""Chat templates are rendered by a process of their own: a template is a program that came with a download.

Its sandbox keeps it from the machine, but not from filling the memory (`"x" * 10 ** 10`) or from going on for ever.
There both are bounded, and no variable of the environment is to be seen.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from diglot.errors import RenderingError

MEMORY = 2**30  # bytes that templates may take, where the system can bound them: on Linux
SECONDS = 30.0  # that a rendering may take
_START_SECONDS = 300.0  # importing from a cold disk is slow, and not the template's doing

_ENVIRONMENT = ("PATH", "HOME", "TZ", "LANG", "LC_ALL")
_ENTRY = (
    "import signal; [signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)]; "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import runpy; "
    "runpy.run_path(sys.argv[2])['serve'](*map(int, sys.argv[3:]))"
)


class TemplateProcess:
    """A process that renders chat templates, one conversation at a time. It starts when it is needed, and again if it
    was ended.

    Args:
        memory: bytes by which it may grow.
        seconds: that one rendering may take.
    """

    def __init__(self, memory: int = MEMORY, seconds: float = SECONDS) -> None:
        self.memory, self.seconds = memory, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget)

    def render(self, arguments: Mapping[str, Any], whole: bool = False) -> str:
        """What `apply_chat_template` makes of these arguments, a template among them.

        It leaves out fields that are None; with `whole` the template gets these too.

        Raises `RenderingError` with the complaint of the template, or what it took too much of.
        """
        with self._lock:
            request = pickle.dumps((dict(arguments), whole))
            if self._process is None:
                self._start()
            try:
                self._requests.send_bytes(request)
                answer = self._answer(self.seconds)
            except (EOFError, OSError) as error:
                self._end()
                raise RenderingError("It ended the process that renders it.") from error
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[:1] == b"1":
            return text
        raise RenderingError(text)

    def close(self) -> None:
        """End the process, if one runs."""
        with self._lock:
            if self._process is not None:
                self._end()

    def _start(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        server = Path(__file__).with_name("template_server.py")
        numbers = (str(theirs_in), str(theirs_out), str(self.memory))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _ENTRY, json.dumps(sys.path), str(server), *numbers],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which needs templates until its step has ended
            env={**{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}, "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._requests, self._answers = Connection(ours_out, readable=False), Connection(ours_in, writable=False)
        try:
            self._answer(_START_SECONDS)
        except EOFError as error:
            code = self._process.wait()
            self._end()
            raise RenderingError(f"The process for chat templates ended with code {code} as it started.") from error

    def _answer(self, seconds: float) -> bytes:
        if self._answers.poll(seconds):
            return self._answers.recv_bytes()
        self._end()
        raise RenderingError(f"It takes more than the {seconds:g} s that a template may have.")

    def _forget(self) -> None:
        """In a fork: the process answers to the one that started it. A new one is started when it is needed."""
        self._lock = threading.Lock()  # another thread may have held the old one
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
            self._process = None
            self._requests.close()
            self._answers.close()

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        self._requests.close()
        self._answers.close()


templates = TemplateProcess()
"""The one of this process."""
atexit.register(templates.close)
