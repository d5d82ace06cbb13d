"""``examples/shift_table.py`` in some seconds: two steps of everything, on few pictures."""

from __future__ import annotations

from shift_table.data import Data, Split
from shift_table.pretraining import Pretraining
from shift_table.rows import FineTuning

TINY = Pretraining(steps=2, per_style=2)
TWO_STEPS = FineTuning(epochs=1, batch_size=8)


def fewer(drawn: Data) -> Data:
    """The data sets with few pictures in each."""

    def thinned(split: Split, step: int) -> Split:
        return Split(split.images[::step], split.target[::step])

    test = {name: thinned(split, 20) for name, split in drawn.test.items()}
    return Data(thinned(drawn.train, 15), thinned(drawn.validation, 4), test)
