"""Studies of what each byte of optimizer state costs in loss, memory and time.

A study trains the same models from the same seeds on real data with each optimizer. The parts:
``config`` (tasks, optimizers, presets), ``data``, ``models``, ``measure`` (bytes, memory, times),
``train`` (one run), ``study`` (all runs), ``results`` (the folder), ``report`` and ``plot``.
``came8bit tradeoff`` is the command line.
"""
