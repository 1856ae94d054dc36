"""Adapts Megatron to the CPU before any test file imports it."""

from megatron_prefix.mcore.cpu import adapt_to_cpu

adapt_to_cpu()
