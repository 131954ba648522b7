"""Tables of the adaptive entropy coder, computed in integers so that every machine has the same."""

import numpy as np
from numpy.typing import NDArray

#: Fractional bits of logits, and bits of mixed probabilities and of the probabilities of contexts.
LOGIT_BITS = 8
PROBABILITY_BITS = 16
STATE_BITS = 22
#: Logits are between -LARGEST_LOGIT and LARGEST_LOGIT; beyond, a probability is less than 2 ** -PROBABILITY_BITS.
LARGEST_LOGIT = 11 << LOGIT_BITS
#: Entries of the table of logits, as bits.
LOGIT_TABLE_BITS = 12
#: The largest count of a context's probability: it averages at least so many decisions.
LARGEST_COUNT = 1023


def _probabilities() -> NDArray[np.int64]:
    """1 / (1 + exp(-logit)) of each logit from the smallest on, but never 0 or 1."""
    one, factor, term = 1 << 64, 0, 1 << 64
    for power in range(1, 20):  # the series of exp(2 ** -LOGIT_BITS)
        factor += term
        term = (term >> LOGIT_BITS) // power
    exponentials = [one]
    for _ in range(LARGEST_LOGIT):
        exponentials.append(exponentials[-1] * factor >> 64)
    upper = [((value << PROBABILITY_BITS + 1) // (value + one) + 1) // 2 for value in exponentials]
    full = 1 << PROBABILITY_BITS
    values = np.array([*(full - value for value in upper[:0:-1]), *upper])
    return values.clip(1, full - 1)


def _logits() -> NDArray[np.int64]:
    """The logit of the middle of each of 2 ** LOGIT_TABLE_BITS equal intervals of probabilities."""
    width = 1 << PROBABILITY_BITS - LOGIT_TABLE_BITS
    upper_middles = np.arange(1 << PROBABILITY_BITS - 1, 1 << PROBABILITY_BITS, width) + width // 2
    upper = np.searchsorted(PROBABILITIES, upper_middles) - LARGEST_LOGIT
    return np.concatenate([-upper[::-1], upper])


#: Logit + LARGEST_LOGIT -> probability in units of 2 ** -PROBABILITY_BITS.
PROBABILITIES = _probabilities().astype(np.int32)
#: The first LOGIT_TABLE_BITS bits of a probability -> logit in units of 2 ** -LOGIT_BITS.
LOGITS = _logits().astype(np.int32)
#: Count of a probability -> share of the difference by which it changes next, in units of 2 ** -RATE_BITS.
RATE_BITS = 16
RATES = ((10 << RATE_BITS) // (10 * np.arange(LARGEST_COUNT + 1) + 16)).astype(np.int32)
