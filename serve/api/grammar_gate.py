"""The gate that every grammar passes before it may reach the engine: a bounded trial in a process of its own.

Owns that process and a cache of verdicts. Invariant: a grammar that hangs, crashes or swallows memory kills the trial
process and nothing else, and is refused; the event loop only waits.
"""

import asyncio
import contextlib
import hashlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict

from tokenizers import Tokenizer

from serve.api.grammar_check import CPU_S, MAX_MEMORY_BYTES
from serve.config import LimitsConfig
from serve.errors import InvalidRequest
from serve.messages import Grammar

_MAX_VERDICTS = 1024
# many times CPU_S: on a crowded machine the process waits for its turn
_WALL_S = 10.0
_JSON_SAMPLE = '{"a": [1, true], "b": -0.5}'

_TOO_COSTLY = (
    f"the grammar takes more than {round(CPU_S * 1000)} ms of CPU or {MAX_MEMORY_BYTES >> 20} MB to compile; "
    "use smaller repetitions, fewer alternatives or less nesting"
)


class GrammarGate:
    """Lets grammars through that compile within bounds. One event loop; call `close` at its end."""

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self._limits = limits
        self._can_write_json = _can_spell(tokenizer, _JSON_SAMPLE)
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        # digest of a grammar to its error, None when it is good
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: Grammar | None, *, param: str = "response_format") -> None:
        """Refuse a grammar that does not compile within the limits; None passes.

        Raises:
            InvalidRequest: it is wrong or too costly, or this model's tokenizer cannot write JSON.
        """
        if grammar is None:
            return
        if len(grammar.text.encode("utf-8", "replace")) > self._limits.max_grammar_bytes:
            raise InvalidRequest(f"the grammar is larger than {self._limits.max_grammar_bytes} bytes", param=param)
        if grammar.kind == "json_schema" and not self._can_write_json:
            raise InvalidRequest("this model's tokenizer has no tokens for JSON's braces and quotes", param=param)
        error = await self._verdict(grammar)
        if error is not None:
            raise InvalidRequest(f"the grammar cannot be used: {error}", param=param)

    async def close(self) -> None:
        """End the trial process."""
        async with self._lock:
            await self._end_process()

    async def _verdict(self, grammar: Grammar) -> str | None:
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        if key not in self._verdicts:
            async with self._lock:
                if key not in self._verdicts:
                    self._verdicts[key] = await self._try(grammar)
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    async def _try(self, grammar: Grammar) -> str | None:
        request = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode() + b"\n"
        try:
            answer = await asyncio.wait_for(self._exchange(request), _WALL_S)
        except BaseException as error:
            # also when the client left: an answer that nobody reads would be taken for the next one's
            await self._end_process()
            if isinstance(error, TimeoutError | ConnectionError):
                return _TOO_COSTLY
            raise
        if not answer:
            await self._end_process()
            return _TOO_COSTLY
        error_text: str | None = json.loads(answer)["error"]
        return error_text

    async def _exchange(self, request: bytes) -> bytes:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "serve.api.grammar_check", stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "both are pipes"
        stdin.write(request)
        await stdin.drain()
        return await stdout.readline()

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _can_spell(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == text.replace(" ", "")
