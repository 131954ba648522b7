"""Codes of b bits as bytes, without gaps, most significant bit first; the last byte is padded with zeros.

Shapes: N kernels, M codes of each, P bytes.
"""

import numpy as np
import torch
from torch import Tensor


def packed_bytes(codes: int, bits: int) -> int:
    """The bytes P of so many codes."""
    return (codes * bits + 7) // 8


def pack_codes(codes_NM: Tensor, bits: int) -> Tensor:
    """The codes as bytes, (P,) uint8.

    >>> [f"{byte:08b}" for byte in pack_codes(torch.tensor([[1, 7, 2]]), 3)]
    ['00111101', '00000000']
    """
    as_bytes = codes_NM.cpu().numpy().astype(">u2").reshape(-1, 1).view(np.uint8)
    return torch.from_numpy(np.packbits(np.unpackbits(as_bytes, axis=1)[:, 16 - bits :]))


def unpack_codes(packed_P: Tensor, bits: int, kernels: int, codebooks: int) -> Tensor:
    """The codes (N, M) int32 that `pack_codes` packed.

    >>> unpack_codes(pack_codes(torch.tensor([[1, 7, 2]]), 3), 3, 1, 3)
    tensor([[1, 7, 2]], dtype=torch.int32)
    """
    count = kernels * codebooks
    padded = np.zeros((count, 16), dtype=np.uint8)
    padded[:, 16 - bits :] = np.unpackbits(packed_P.cpu().numpy(), count=count * bits).reshape(count, bits)
    codes = np.packbits(padded, axis=1).view(">u2").astype(np.int32)
    return torch.from_numpy(codes.reshape(kernels, codebooks))
