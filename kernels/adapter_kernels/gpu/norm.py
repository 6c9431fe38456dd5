"""RMSNorm inside other kernels: the two orders of rounding, once for all sinks.

Owns no launch. Invariant: values are fp32 in registers but rounded to the model's dtype exactly where
`serve.model.layers` rounds.
"""

import triton
import triton.language as tl


@triton.jit
def scale_normed(x, inverse_rms, weight, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """Return round(x * inverse_rms * weight) as fp32; CAST_FIRST rounds before the weight as well."""
    normed = x * inverse_rms
    if CAST_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight).to(dtype).to(tl.float32)
