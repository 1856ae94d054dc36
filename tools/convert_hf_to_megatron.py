"""Turns a Hugging Face folder into a Megatron distributed checkpoint of its weights.

OUTPUT gets step_00000000/ (the checkpoint, with a SHA-256 manifest) and hf/ (config, tokenizer).
It loads into any layout. Every tensor is looked at first; the result is read back and compared with
the source bit for bit before it takes its place.
"""

import argparse
import sys
from pathlib import Path

from megatron_prefix.mcore.cpu import adapt_to_cpu


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-model", type=Path, required=True, help="config.json, safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of the weights (default: the model's own)"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that share the layers, and the memory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once whole")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    adapt_to_cpu()  # before any import of Megatron
    from megatron_prefix.mcore.convert import Conversion, hf_to_megatron
    from megatron_prefix.mcore.progress_bar import byte_progress
    from megatron_prefix.mcore.source import check_values, open_source, parameters, params_dtype
    from megatron_prefix.mcore.tool import check_output, check_ranks, gib

    check_output(args.output, overwrite=args.overwrite)
    folder, hf = open_source(args.hf_model)
    check_ranks(args.ranks, hf.shape.num_layers)
    dtype = args.dtype or params_dtype(folder)
    size = parameters(hf) * (4 if dtype == "fp32" else 2)
    total = sum(file.stat().st_size for file in {e.file for e in folder.tensors.values()})
    with byte_progress("checking", total) as advance:
        check_values(folder, advance)
    what = f"{hf.config['architectures'][0]}, {parameters(hf):,} parameters, {gib(size)} in {dtype}"
    if args.dry_run:
        print(f"would write {args.output}: {what}")
        return 0
    hf_to_megatron(Conversion(args.hf_model, args.output, dtype, args.ranks))
    print(f"wrote {args.output}: {what}")
    return 0


def main(argv: list[str] | None = None) -> int:
    from megatron_prefix.mcore.tool import run_tool

    args = parse_args(argv)
    return run_tool("convert_hf_to_megatron", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
