"""The process that renders chat templates, run as a file of its own: it imports transformers and nothing of Diglot."""

from __future__ import annotations

import pickle
import re
import sys
from multiprocessing.connection import Connection
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


def serve(reads_from: int, writes_to: int, memory: int) -> None:
    """Answer requests until the other end is closed: `b"1"` and the text, or `b"0"` and the complaint.

    A request is a pickle of the arguments of `apply_chat_template`, and whether to keep fields that are None. It comes
    from the process that started this one.
    The answer is text, since a template has a say in it.
    """
    tokenizer = PreTrainedTokenizerBase()
    _bound(memory)
    with Connection(reads_from, writable=False) as requests, Connection(writes_to, readable=False) as answers:
        answers.send_bytes(b"1")  # ready
        while True:
            try:
                request = requests.recv_bytes()
            except EOFError:
                return
            answers.send_bytes(_answer(tokenizer, request, memory))


def _answer(tokenizer: PreTrainedTokenizerBase, request: bytes, memory: int) -> bytes:
    try:
        arguments, whole = pickle.loads(request)
        text = _whole(**arguments) if whole else tokenizer.apply_chat_template(**arguments)
        return b"1" + str(text).encode("utf-8", "surrogatepass")
    except MemoryError:
        return b"0It takes more than the %d MiB that a template may have." % (memory >> 20)
    except Exception as error:  # jinja's errors, and whatever a template raises
        return b"0" + str(error).encode("utf-8", "surrogatepass")


def _whole(conversation: list[Any], tokenize: bool, **arguments: Any) -> str:
    """`apply_chat_template` without its leaving out fields that are None."""
    rendered: Any = render_jinja_template(conversations=[conversation], **arguments)[0]
    return str(rendered[0])


def _bound(memory: int) -> None:
    """This process may grow by `memory` bytes from here, where the system can say so, and write no file."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/status") as status:
        size = re.search(r"VmSize:\s+(\d+) kB", status.read())
    assert size is not None
    most = int(size[1]) * 1024 + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
