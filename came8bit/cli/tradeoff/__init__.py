"""``came8bit tradeoff``: what each byte of optimizer state costs in accuracy, memory and time.

Trains the same model from the same seeds on real data with each optimizer and compares them.

The parts: ``config`` (what a study is, the presets), ``data``, ``models``, ``optimizers`` (what is
compared), ``measure`` (bytes, memory, times), ``train`` (one run), ``worker`` (one run in its own
process), ``study`` (all runs), ``stats``, ``store``, ``report``, ``plot``, and ``command`` (the
command line).
"""

from came8bit.cli.tradeoff.command import add_parser

__all__ = ["add_parser"]
