"""Serialization of codes: bit-packed for checkpoints, entropy-coded for .nern files.

Packed codes take `bits` bits each, most significant bit first; the last byte is padded with zeros. The entropy coder
uses one distribution per codebook and layer.

Shapes: L layers, N kernels, M codes of each, P bytes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nernlit.errors import LayoutError
from nernlit.storage.bits import from_bits, to_bits
from nernlit.storage.entropy import decode, encode


def packed_bytes(codes: int, bits: int) -> int:
    """The bytes P of so many codes."""
    return (codes * bits + 7) // 8


def pack_codes(codes_NM: Tensor, bits: int) -> Tensor:
    """The codes as bytes, (P,) uint8.

    >>> [f"{byte:08b}" for byte in pack_codes(torch.tensor([[1, 7, 2]]), 3)]
    ['00111101', '00000000']
    """
    return torch.from_numpy(np.packbits(to_bits(codes_NM.cpu().numpy(), bits)))


def unpack_codes(packed_P: Tensor, bits: int, kernels: int, codebooks: int) -> Tensor:
    """The codes (N, M) int32 that `pack_codes` packed.

    >>> unpack_codes(pack_codes(torch.tensor([[1, 7, 2]]), 3), 3, 1, 3)
    tensor([[1, 7, 2]], dtype=torch.int32)
    """
    count = kernels * codebooks
    codes = from_bits(np.unpackbits(packed_P.cpu().numpy(), count=count * bits), bits, count)
    return torch.from_numpy(codes.reshape(kernels, codebooks)).int()


def encode_codes(codes_NM: Tensor, kernels_L: Sequence[int]) -> Tensor:
    """The codes as an entropy code, (P,) uint8.

    Args:
        codes_NM: The codes of each kernel, one layer after the other.
        kernels_L: The number of kernels of each layer.

    >>> codes_NM = torch.tensor([[0, 5], [0, 5], [1, 7]], dtype=torch.int32)
    >>> decode_codes(encode_codes(codes_NM, [2, 1]), [2, 1], codebooks=2, bits=3)
    tensor([[0, 5], [0, 5], [1, 7]], dtype=torch.int32)
    """
    by_layer = [codes.T.flatten() for codes in codes_NM.split(list(kernels_L))]
    return encode(torch.cat(by_layer), _groups(kernels_L, codes_NM.shape[1]))


def decode_codes(coded_P: Tensor, kernels_L: Sequence[int], codebooks: int, bits: int) -> Tensor:
    """The codes (N, M) int32 that `encode_codes` coded.

    Raises:
        FileFormatError: If the bytes are not those of so many codes.
        LayoutError: If a code does not have so many bits.
    """
    codes = decode(coded_P, _groups(kernels_L, codebooks))
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise LayoutError(f"a code of the predictor is outside 0..{2**bits - 1} ({bits} bits).")
    by_layer = codes.split([codebooks * kernels for kernels in kernels_L])
    return torch.cat([part.view(codebooks, -1).T for part in by_layer]).int()


def _groups(kernels_L: Sequence[int], codebooks: int) -> list[int]:
    return [kernels for kernels in kernels_L for _ in range(codebooks)]
