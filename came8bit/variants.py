"""Classes that settle the bits of :class:`~came8bit.CAME` and whether its state is paged."""

from __future__ import annotations

from .optim import CAME


class CAME32bit(CAME):
    """:class:`CAME` with fp32 momentum, about 4.01 bytes of state per parameter."""

    _optim_bits = 32


class CAME8bit(CAME):
    """:class:`CAME` with momentum in 8 bits, about 1.02 bytes of state per parameter.

    Momentum is kept in signed square-root codes, scaled by the largest magnitude of a block of 256
    values that never crosses a slice of the first dimension
    (:mod:`came8bit.reference.quant`). A zero stays exactly zero, and the momentum of an element
    whose gradient has stopped decays to zero. The factored statistics stay fp32: they change by
    0.1 % and 0.01 % a step, which 8 bits cannot hold. The update of a step uses the momentum before
    it is coded.

    Arguments are those of :class:`CAME`; ``optim_bits`` is 8. A parameter group may still set it to
    32, for instance for embeddings.
    """

    _optim_bits = 8


class PagedCAME(CAME):
    """:class:`CAME32bit` with paged state: ``is_paged=True``."""

    _optim_bits = 32
    _is_paged = True


class PagedCAME32bit(PagedCAME):
    """The same as :class:`PagedCAME`."""


class PagedCAME8bit(CAME):
    """:class:`CAME8bit` with paged state: ``is_paged=True``."""

    _optim_bits = 8
    _is_paged = True


class CAME4bit(CAME):
    """:class:`CAME` with momentum in 4 bits, about 0.52 bytes of state per parameter.

    As :class:`CAME8bit`, with 15 levels, blocks of 128 values and bf16 scales. What the code does
    not remember of the momentum acts at once, so that every gradient has its whole effect
    (:mod:`came8bit.reference.rungs`).
    """

    _optim_bits = 4


class CAME2bit(CAME):
    """:class:`CAME` with momentum in 2 bits, about 0.29 bytes of state per parameter.

    As :class:`CAME4bit`, with the sign and two levels of magnitude for a block of 128 values. To
    fine-tune a pretrained model begin with a quarter of the learning rate: at that of
    :class:`CAME8bit` it ended clearly above it.
    """

    _optim_bits = 2


class PagedCAME4bit(CAME):
    """:class:`CAME4bit` with paged state: ``is_paged=True``."""

    _optim_bits = 4
    _is_paged = True


class PagedCAME2bit(CAME):
    """:class:`CAME2bit` with paged state: ``is_paged=True``."""

    _optim_bits = 2
    _is_paged = True


# Some trainers send every name that ends in "8bit" to bitsandbytes.
CAME8, CAME4, CAME2 = CAME8bit, CAME4bit, CAME2bit
PagedCAME8, PagedCAME4, PagedCAME2 = PagedCAME8bit, PagedCAME4bit, PagedCAME2bit
