"""llama.cpp as a peer, through llama-cpp-python: a process that answers one JSON line with another.

bench/llamacpp.py starts it with the Python that has that package, so it imports nothing of ours.
The model is given as {"gguf", "context", "threads"}. Requests are {"do": one of ANSWERS, ...}.
"""

import json
import math
import resource
import statistics
import sys
import time


def prefill(llm, n):
    """Seconds to read n tokens."""
    llm.reset()
    start = time.perf_counter()
    llm.eval(prompt(n))
    return time.perf_counter() - start


def decode(llm, held, n):
    """Median seconds of n steps that follow `held` tokens."""
    llm.reset()
    llm.eval(prompt(held))
    times = []
    for token_id in range(5, 5 + n):
        start = time.perf_counter()
        llm.eval([token_id])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shift(llm, ids, n_keep, position):
    """Feed ids, all but the last, one by one, as llama.cpp's own programs do with a context that
    shifts: when it is full, the first n_keep tokens stay, half of the rest goes, and the keys of
    what remains are rotated anew. The nats of each following token, the seconds of each step, and
    the position afterwards."""
    import llama_cpp
    context, n_vocab = llm.ctx, llm.n_vocab()
    memory, nats, times = llama_cpp.llama_get_memory(context), [], []
    if not position:
        llama_cpp.llama_memory_clear(memory, True)
    for token_id, following in zip(ids, ids[1:]):
        start = time.perf_counter()
        if position == llm.n_ctx():
            gone = (position - n_keep) // 2
            llama_cpp.llama_memory_seq_rm(memory, 0, n_keep, n_keep + gone)
            llama_cpp.llama_memory_seq_add(memory, 0, n_keep + gone, position, -gone)
            position -= gone
        token = (llama_cpp.llama_token * 1)(token_id)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
            raise RuntimeError(f"llama_decode failed at position {position}")
        row = llama_cpp.llama_get_logits_ith(context, -1)
        times.append(time.perf_counter() - start)
        position += 1
        nats.append(cross_entropy(row, n_vocab, following))
    return {"nats": nats, "seconds": times, "position": position}


def cross_entropy(row, n_vocab, following):
    """Nats that the token `following` costs under a row of logits."""
    import numpy
    logits = numpy.ctypeslib.as_array(row, (n_vocab,)).astype(numpy.float64)
    top = logits.max()
    return float(top + math.log(numpy.exp(logits - top).sum()) - logits[following])


def peak_bytes(llm):
    """Of this process. On Linux ru_maxrss would begin with its parent's."""
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(file.read().partition("VmHWM:")[2].split()[0])
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def prompt(n):
    return [100 + i % 1000 for i in range(n)]


ANSWERS = {"prefill": prefill, "decode": decode, "shift": shift, "peak_bytes": peak_bytes}


def open_model(settings):
    """The model in llama.cpp. Prints the first answer: a version, or why there is no model."""
    try:
        import llama_cpp
        llm = llama_cpp.Llama(settings["gguf"], n_ctx=settings["context"], n_batch=512,
                              n_threads=settings["threads"], n_threads_batch=settings["threads"],
                              verbose=False, use_mmap=False)
    except ImportError as error:
        print(json.dumps({"error": f"--llama-python {sys.executable}: {error}; "
                                   "pip install llama-cpp-python"}))
        sys.exit()
    except ValueError as error:
        print(json.dumps({"error": f"--gguf {settings['gguf']}: llama.cpp: {error}"}))
        sys.exit()
    print(json.dumps({"version": llama_cpp.__version__, "context": llm.n_ctx()}), flush=True)
    return llm


def main():
    llm = open_model(json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(ANSWERS[request.pop("do")](llm, **request)), flush=True)


if __name__ == "__main__":
    main()
