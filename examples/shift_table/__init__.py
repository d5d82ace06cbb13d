"""The parts of ``examples/shift_table.py``, in the order a reader meets them.

``drawing`` turns ink into pictures, ``data`` makes the data sets, ``model`` is the small CLIP, ``pretraining`` gives it
its zero-shot skill, ``rows`` fine-tunes it in every way that the table compares (this is where calrobust comes in), and
``results``, ``findings`` and ``sheet`` show what came out. ``training`` and ``checkpoint`` are what both trainings
stand on.
"""
