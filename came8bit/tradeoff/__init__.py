"""Studies of what each byte of optimizer state costs in accuracy, memory and time.

Trains the same model from the same seeds on real data with each optimizer and compares them.

The parts: ``config`` (what a study is, the presets, what is compared), ``data``, ``models``,
``measure`` (bytes, memory, times), ``train`` (one run), ``study`` (all runs), ``results``,
``report`` and ``plot``. ``came8bit tradeoff`` is its command line.
"""
