"""The KV cache's blocks: who holds which, which are free, and which hold a prefix that another sequence may reuse.

Owns block ids, reference counts and the prefix cache, never the K/V itself. A block's hash covers its own tokens and,
through its parent's hash, all tokens before it; the chain starts from the name of what acts (an adapter's digest, or a
composition) and the caller's salt. An adapter that acts from some position on leaves the base's chain there.
Invariant: every block is exactly one of free, cached (published, held by nobody, reusable) or held (reference count
>= 1); a block is published only once its content was verified finite, and is not written again while published.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from struct import pack


def hash_seed(name: str | None, cache_salt: str) -> bytes:
    """Start a hash chain: blocks are shared only between sequences of equal salt on which the same acts."""
    acting = (name or "").encode()
    # the length keeps ("ab", "c") and ("a", "bc") apart
    return hashlib.sha256(pack("<q", len(acting)) + acting + cache_salt.encode("utf-8", "surrogatepass")).digest()


def hash_activation(parent: bytes, name: str | None, active_from: int) -> bytes:
    """Leave the base's chain: from this position on, inside the next block or at its begin, the named adapter acts."""
    return hashlib.sha256(b"active" + parent + pack("<q", active_from) + (name or "").encode()).digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Extend a hash chain by one full block of tokens."""
    return hashlib.sha256(parent + pack(f"<{len(token_ids)}q", *token_ids)).digest()


class KvBlocks:
    """Hands out blocks and takes them back; a released block that is published stays reusable until it is needed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        # cached blocks, the next one to be overwritten first
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that `acquire` could hand out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_in_use(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self.num_available

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the published blocks of the longest known prefix of `hashes`; takes no hold on them."""
        blocks: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def num_new_needed(self, shared: list[int], num_blocks: int) -> int:
        """Count how many available blocks a table of `num_blocks` takes away when it starts with `shared`."""
        return num_blocks - len(shared) + sum(1 for block_id in shared if self._num_refs[block_id] == 0)

    def acquire(self, shared: list[int], num_blocks: int) -> list[int] | None:
        """Take a hold on a table of `num_blocks` that starts with the matched blocks `shared`.

        Returns:
            The table, owned by the caller until `release`; None, with nothing taken, when too few blocks are available.
        """
        if self.num_new_needed(shared, num_blocks) > self.num_available:
            return None
        # held first: an unheld prefix block could be handed out again as a new one
        for block_id in shared:
            if self._num_refs[block_id] == 0:
                del self._cached[block_id]
            self._num_refs[block_id] += 1
        return shared + [self._take() for _ in range(num_blocks - len(shared))]

    def extend(self, table: list[int], num_blocks: int) -> bool:
        """Grow `table` in place to `num_blocks`; False, with nothing taken, when too few blocks are available."""
        num_missing = num_blocks - len(table)
        # most steps of most sequences
        if num_missing <= 0:
            return True
        if num_missing > self.num_available:
            return False
        table.extend(self._take() for _ in range(num_missing))
        return True

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let later sequences reuse a held block whose content was verified finite; the first of equal blocks wins."""
        assert self._num_refs[block_id] > 0, f"block {block_id} is published but held by nobody"
        if block_hash not in self._block_of and self._hash_of[block_id] is None:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def retract(self, table: list[int]) -> list[int]:
        """Unpublish the blocks of a suspect sequence that nobody else holds, and return them for zeroing."""
        exclusive = [block_id for block_id in table if self._num_refs[block_id] == 1]
        for block_id in exclusive:
            self._forget(block_id)
        return exclusive

    def release(self, table: list[int]) -> None:
        """Give back one hold on each block of `table` and empty it."""
        # the tail goes first: a chain whose head is overwritten is lost as a whole
        for block_id in reversed(table):
            assert self._num_refs[block_id] > 0, f"block {block_id} is released more often than acquired"
            self._num_refs[block_id] -= 1
            if self._num_refs[block_id] == 0:
                if self._hash_of[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None
        table.clear()

    def is_published(self, block_id: int) -> bool:
        """Say whether the block's content is fixed and may be shared."""
        return self._hash_of[block_id] is not None

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Recompute every derived set from the live sequences' tables and compare; for tests and idle checks."""
        num_refs = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                num_refs[block_id] += 1
        assert num_refs == self._num_refs, "reference counts differ from the live block tables"
        held = {block_id for block_id, count in enumerate(num_refs) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & held or cached & held), "a block is in two states"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is in no state"
        assert all(self._hash_of[block_id] is None for block_id in free), "a free block is still published"
        assert all(self._hash_of[block_id] is not None for block_id in cached), "a cached block has no hash"
        published = {block_hash: b for b, block_hash in enumerate(self._hash_of) if block_hash is not None}
        assert published == self._block_of, "the prefix index differs from the blocks' hashes"

    def _take(self) -> int:
        """Hand out one block with one hold on it; the caller checked that one is available."""
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        self._num_refs[block_id] = 1
        return block_id

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None
