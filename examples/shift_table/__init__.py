"""The parts of ``examples/shift_table.py``, in the order a reader meets them.

``drawing`` turns ink into pictures, ``data`` makes the data sets, ``model`` is the small CLIP, ``pretraining`` gives it
its zero-shot skill, ``rows`` fine-tunes it in nine ways (this is where calrobust comes in), ``results`` says what came out.
"""
