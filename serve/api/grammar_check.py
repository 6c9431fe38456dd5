"""The process that compiles foreign grammars first: `python -m serve.api.grammar_check`.

Owns one compile at a time under a limit of CPU and memory; reads one JSON line per grammar, writes one per verdict. It
dies rather than exceed its limits, and its parent reads that as a refusal. Invariant: nothing but llguidance on a
byte-level tokenizer runs here, so a crash costs 20 MB of memory and no request.
"""

import json
import re
import resource
import signal
import sys

import llguidance

from serve.engine.grammar_source import limits, source
from serve.messages import Grammar

CPU_S = 0.25
MAX_MEMORY_BYTES = 192 << 20
_MAX_ERROR_CHARS = 200
# a control token by its id: our own tool grammars use them, and this tokenizer has only bytes
_TOKEN_ID = re.compile(r"<\[[0-9]+\]>")


def find_error(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> str | None:
    """Compile a grammar and its first mask; return what is wrong in one line, or None."""
    text = _TOKEN_ID.sub('"\\\\u0001"', grammar.text) if grammar.kind == "lark" else grammar.text
    try:
        compiled = llguidance.LLMatcher(tokenizer, source(Grammar(grammar.kind, text)), log_level=0, limits=limits())
    except ValueError as error:
        return _first_line(str(error))
    if not compiled.is_error():
        compiled.compute_bitmask()
    if compiled.is_error():
        return _first_line(compiled.get_error())
    return "it allows no text at all" if compiled.is_stopped() else None


def main() -> None:
    """Serve verdicts until the parent closes the pipe."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # counts the CPU time of this process; its default action ends it
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        error = find_error(Grammar(request["kind"], request["text"]), tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"error": error}) + "\n")
        sys.stdout.flush()


def _first_line(text: str) -> str:
    return (text.splitlines() or ["it cannot be compiled"])[0][:_MAX_ERROR_CHARS]


if __name__ == "__main__":
    main()
