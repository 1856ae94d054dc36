"""Turns a Hugging Face folder into a Megatron distributed checkpoint of its weights.

OUTPUT gets step_00000000/ (the checkpoint, with a manifest of sums) and hf/ (config, tokenizer).
It loads into any layout. FP8 weights with blocks of 128 x 128 (DeepSeek's) are dequantised. A
process holds one tensor at a time; every one is looked at, and what was written is read back and
compared bit for bit before OUTPUT takes its place.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.mcore.tool import add_output_arguments, run_tool, tool_parser

if TYPE_CHECKING:
    from megatron_prefix.mcore.crew import Crew


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = tool_parser(__doc__)
    parser.add_argument("--hf-model", type=Path, required=True, help="config.json, safetensors")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], help="of the weights (default: the model's own)"
    )
    add_output_arguments(parser)
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    from megatron_prefix.mcore.crew import torchrun_crew

    with torchrun_crew() as crew:
        convert(args, crew)
    return 0


def convert(args: argparse.Namespace, crew: "Crew") -> None:
    from megatron_prefix.mcore.progress_bar import byte_progress
    from megatron_prefix.mcore.source import open_source, parameters, params_dtype
    from megatron_prefix.mcore.tool import check_output, check_ranks, check_room, done, gib

    check_ranks(args.ranks, crew.size)
    crew.lead(lambda: check_output(args.output, args.hf_model, overwrite=args.overwrite))
    folder, hf = crew.alike(lambda: open_source(args.hf_model))
    adapt_to_cpu()  # before any import of Megatron, which says much
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_megatron import hf_to_megatron

    dtype = args.dtype or params_dtype(folder, hf)
    job = Conversion(hf, args.output, dtype, args.ranks, crew=crew)
    what = f"{hf.config['architectures'][0]}, {parameters(hf):,} parameters, "
    what += f"{gib(job.bytes)} in {dtype}"
    crew.lead(lambda: check_room(args.output, 0 if args.dry_run else job.bytes))
    label = "checking" if args.dry_run else "converting"
    with byte_progress(label, job.bytes // crew.size, show=crew.rank == 0) as advance:
        hf_to_megatron(job, advance, dry_run=args.dry_run)
    done(args, what, crew.rank)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool("convert_hf_to_megatron", lambda: work(args), writes=True)


if __name__ == "__main__":
    sys.exit(main())
