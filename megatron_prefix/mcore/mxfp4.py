"""Weights in MXFP4 as GPT-OSS is published: two values of four bits a byte, and one scale for 32 of
them (OCP Microscaling Formats, version 1.0, sections 5.3.3 and 5.4.1). Read alone: nothing here is
written in it.

Legend: E experts, R rows of an expert's matrix, G blocks of 32 columns in each.
"""

import torch
from torch import Tensor

# E2M1: a sign, two bits of exponent and one of mantissa.
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127  # of E8M0: eight bits of exponent alone


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, R, G, 16] and uint8 [E, R, G] -> fp32 [E, 32 * G, R], rows and columns changed as
    in the folder before quantisation. A byte's lower half comes first."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.tensor([*POSITIVE, *(-value for value in POSITIVE)])[codes.int()]
    exponents = scales.to(torch.int32)[..., None] - SCALE_BIAS
    return torch.ldexp(values, exponents).flatten(-2).transpose(1, 2).contiguous()
