"""The parts of ``examples/shift_table.py``, in the order a reader meets them.

``pictures`` turns ink into pictures, ``data`` makes the data sets, ``model`` pre-trains the small CLIP, ``rows``
fine-tunes it in every way that the table compares (this is where calrobust comes in), ``results`` shows what came out,
and ``cache`` keeps what took long. ``protocol.md`` says what was decided before the reported sets were looked at.
"""
