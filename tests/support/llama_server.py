"""llama.cpp's own server on loopback, as a process: `python llama_server.py FILE.gguf`; prints its address, then waits.

`xllamacpp` on PyPI is llama.cpp with its server, compiled.
"""

from __future__ import annotations

import sys

import xllamacpp

if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], 0
    params.n_ctx, params.cpuparams.n_threads = 256, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
