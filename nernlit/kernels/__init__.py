"""The kernels that a predictor represents: their layout in a table, their addresses and orders, and sampling."""

from nernlit.kernels.addresses import addresses, are_addresses
from nernlit.kernels.blocks import Layer, Pointwise
from nernlit.kernels.coded_order import coded_bits, decode_order, encode_order
from nernlit.kernels.layers import LayerFilter, LayerPreset
from nernlit.kernels.layout import Layout
from nernlit.kernels.orders import OrderName, cross_filter_order, greedy_order, in_filter_order
from nernlit.kernels.packing import pack_order, packed_bits, unpack_order
from nernlit.kernels.sampling import AllKernels, MagnitudeMix, Sampling, Uniform, derive_seed

__all__ = [
    "AllKernels",
    "Layer",
    "LayerFilter",
    "LayerPreset",
    "Layout",
    "MagnitudeMix",
    "OrderName",
    "Pointwise",
    "Sampling",
    "Uniform",
    "addresses",
    "are_addresses",
    "coded_bits",
    "cross_filter_order",
    "decode_order",
    "derive_seed",
    "encode_order",
    "greedy_order",
    "in_filter_order",
    "pack_order",
    "packed_bits",
    "unpack_order",
]
