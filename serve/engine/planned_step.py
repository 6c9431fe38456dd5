"""One decided step on its way: the plan, and the sequences that its rows belong to.

Owns the pairing of rows and sequences from the decision to the results. Invariant: `plan.rows[i]` is a row of
`seqs[i]`, and what a row names stays with its sequence until the row has come back (see `lifecycle`).
"""

from dataclasses import dataclass, replace

from serve.engine.plan import Row, StepPlan
from serve.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan and its sequences, in the same order."""

    plan: StepPlan
    seqs: list[Sequence]

    def settled(self) -> StepPlan:
        """Return what is left to run of this step once every earlier step's results were applied.

        Tokens that were in flight when the step was decided are known by then, and rows of sequences that ended
        meanwhile are left out.
        """
        rows = [
            _with_known_token(row, seq)
            for row, seq in zip(self.plan.rows, self.seqs, strict=True)
            if seq.state is not SequenceState.ENDED
        ]
        slots = {slot for row in rows for slot in row.slots}
        return StepPlan(rows, {slot: digest for slot, digest in self.plan.slot_digests.items() if slot in slots})


def _with_known_token(row: Row, seq: Sequence) -> Row:
    return replace(row, token_ids=seq.output_ids[-1:], is_chained=False) if row.is_chained else row
