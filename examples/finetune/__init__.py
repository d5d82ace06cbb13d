"""The parts of ``examples/finetune.py``: what it reads, the model, and training.

Everything random is a function of the seed, the step and the picture. So a run that was cut off goes on bit for bit
without the state of any generator in its checkpoint, however many workers read the pictures.
"""


class RunError(Exception):
    """What is wrong and how to mend it, in one line for the user."""
