"""What a worker tells of a run that begins."""

from serve.trainer.telling import Telling
from serve.trainer.wire import Begun


def told(begun: Begun) -> list[tuple[str, str]]:
    """Return the events, as (level, message), of a run that begins so."""
    telling = Telling()
    telling.begun(begun)
    return [(event.level, event.message) for event in telling.take()[0]]


def test_examples_that_are_cut_are_told_once() -> None:
    begun = Begun(total_steps=9, resumed_step=0, num_trainable=5, num_cut=2, max_length=64)
    assert told(begun) == [
        ("info", "Training 5 parameters in 9 steps"),
        ("warn", "2 examples are longer than max_length 64 tokens, and learnt without the end"),
    ]
    resumed = Begun(total_steps=9, resumed_step=4, num_trainable=5, num_cut=2, max_length=64)
    assert [level for level, _ in told(resumed)] == ["info"]


def test_nothing_is_told_where_nothing_is_cut() -> None:
    begun = Begun(total_steps=9, resumed_step=0, num_trainable=5, num_cut=0, max_length=64)
    assert [level for level, _ in told(begun)] == ["info"]
