"""Every tolerance of the test suite, with the reason for its size.

``U`` is the unit roundoff of fp32. Where a test can ask for equality it does (``torch.equal``);
what is here is for comparisons with other arithmetic.
"""

U = 2.0**-24

# --- against came-pytorch, 100 steps at lr 1e-4 ---------------------------------------------------
# came-pytorch in fp32 is itself 2e-7 to 5e-7 of the distance travelled away from a float64 run of
# the same rule on matrices, and up to 5e-5 where the distance is short (1-D, strong clipping),
# because every step rounds the parameter.

PARITY_PARAM = 1e-6
"""||p - p'|| / ||p||. The parameter is rounded once a step by either side, errors independent:
sqrt(2 * 100) * U = 8e-7 where every element rounds at its worst; measured 1.2e-7, 3.2e-7 at
beta1 = 0, where an update moves the parameter ten times further."""

PARITY_DISTANCE = 2e-6
"""Part of the distance travelled, for the error of the updates: some twenty fp32 operations from
gradient to update, of which reductions over up to 300 elements are the worst, 30 * U = 2e-6."""

PARITY_ROUNDING = 100**0.5 * U
"""Part of ||p||, added to the former: one rounding of the parameter a step, a random walk."""

PARITY_STATISTICS = 5e-5
"""r, c, R, C, v elementwise. r and c are averages of positive numbers, good to a few U times the
100 steps of the average (1e-5 at worst, 2e-6 measured). The instability adds the cancellation
in u - m: with updates that repeat up to 1e-3 it loses a factor of 30 (measured 3e-5)."""

FLOAT64_FACTOR = 2.0
"""Our error against float64 may be this many times came-pytorch's: the same count of roundings in
another order; measured 0.9 to 1.2."""

FLOAT64_FLOOR = 5e-7
"""Below this part of the distance travelled both are at rounding noise; a ratio means nothing."""

# --- the instability around an expected clip scale ------------------------------------------------

INSTABILITY = 1e-5
"""Row means of the instability against float64 where updates repeat up to relative noise 0.01:
the noise of u - m is U / 0.01 = 6e-6 for any fp32 evaluation of the definition itself."""

# --- the 8-bit momentum ---------------------------------------------------------------------------

DEAD_COLUMNS = 0.02
"""Where gradients stop, distance travelled with 8-bit momentum against fp32 after 20,000 steps.
One code is 1.6 % of the value near absmax and errors of live steps average out; without rounding
toward zero the excess is 20 % (this code) to 1400 % (uniform)."""

EIGHT_BIT_MOMENTUM = 0.02
"""Relative RMS error of 8-bit momentum that is coded again at every step, against fp32 momentum
of the same gradients: 0.8 % a coding, sum of the geometric series sqrt(1 / (1 - 0.81)) = 2.3."""

SMALL_LR_DISPLACEMENT = 0.05
"""Displacement of bf16 parameters at a tiny lr against fp32, as an average over 16,384 elements:
rounding up has probability q << 1, so the standard error is 1 / sqrt(q * steps * 16384); with
q = 0.01 and 300 steps 0.5 %, plus 2 % for the first-order effect of the parameters' own spread."""

# --- several ranks --------------------------------------------------------------------------------

STATISTICS_OF_RANKS = 2e-6
"""Relative, of statistics on several ranks: sums of fp32 in another order, over a few steps."""

TRAVELLED = 1e-5
"""Distance to one process as a part of the distance travelled, 100 steps of fp32: gradients are
added up in another order, and CAME divides by their size."""

TRAVELLED_ROUGH = 0.3
"""The same for each parameter after 5 steps where gradients are computed or parameters stored in
bf16. Its rounding errors of 2^-9 are of the size of an update; 0.14 to 0.20 were measured."""

# --- memory ---------------------------------------------------------------------------------------

LLAMA_BYTES = 1.02
GPT2_BYTES = 1.037
"""State bytes per parameter: 1 + 4/256 + 8 (n + k) / (n k) for matrices, 8 for 1-D parameters."""

STEP_EXTRA_FRACTION = 0.01
STEP_EXTRA_BYTES = 8 << 20
"""What a step may take beside state and gradients: partial column sums, bounded to 1 % of the
parameters, and pages that threads touch."""
