"""llama.cpp's own server (by xllamacpp) on a GGUF file, asked over HTTP; the template is the one in the file."""

import os

import xllamacpp
from driver import Answer, Clock, Request, run
from http_chat import chats

SLOTS = 4


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel = 1024 * SLOTS, SLOTS
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    server = xllamacpp.Server(params)
    clock.lap("load")
    # a prompt's beginning that another had is read again, so that no answer depends on those before it
    extra = {"verbose": True, "return_tokens": True, "cache_prompt": False}
    found = chats(server.listening_address, form, request, extra, lambda given: given["__verbose"]["tokens"])
    clock.lap("answer")
    return found


if __name__ == "__main__":
    run(answer, ["xllamacpp"])
