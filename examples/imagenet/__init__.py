"""The parts of ``examples/imagenet.py``, in the order a reader meets them.

``options`` holds the presets, ``data`` finds pictures and classes, ``pictures`` reads them, ``model`` asks open_clip
for weights, ``methods`` gives every row of the table its loss (this is where calrobust comes in), ``training`` is the
loop, ``evaluation`` judges. ``checkpoint``, ``logs``, ``processes`` and ``errors`` serve them.

Everything random is a function of the seed, the step and the picture: a run that was cut off goes on bit for bit
without any generator's state in its checkpoint, and however many workers read the pictures.
"""
