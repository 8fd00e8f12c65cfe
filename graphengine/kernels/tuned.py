"""How do products run in the ways that were the fastest here? `fused`, and a table for them."""

from __future__ import annotations

from torch import Tensor

from graphengine.kernels import fused
from graphengine.kernels.fused_linear import linear_by, linear_silu_mul_by, product_of
from graphengine.kernels.ways import Product, Way


class TunedKernels:
    """`Kernels` of a GPU. A decode step's product runs as `ways` says, or, where that says nothing,
    by the rule of its shape; all else as in `fused`."""

    rms_norm = staticmethod(fused.rms_norm)
    add_rms_norm = staticmethod(fused.add_rms_norm)
    rope_and_cache = staticmethod(fused.rope_and_cache)
    add_linear = staticmethod(fused.add_linear)
    decode_chain = staticmethod(fused.decode_chain)
    sample = staticmethod(fused.sample)

    def __init__(self, ways: dict[Product, Way]) -> None:
        """ways: may be changed as long as no step is captured."""
        self.ways = ways

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        whole: bool = False,
        decode: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """`reference.linear`."""
        if decode and not whole and out is None:
            product = product_of(x, weight, silu=False)
            if product in self.ways:
                return linear_by(self.ways[product], x, weight, bias)
        return fused.linear(x, weight, bias, whole=whole, decode=decode, out=out)

    def linear_silu_mul(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, decode: bool = False
    ) -> Tensor:
        """`reference.linear_silu_mul`."""
        if decode:
            product = product_of(x, weight, silu=True)
            if product in self.ways:
                return linear_silu_mul_by(self.ways[product], x, weight, bias)
        return fused.linear_silu_mul(x, weight, bias, decode=decode)
