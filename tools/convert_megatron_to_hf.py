"""Turns a Megatron distributed checkpoint into a Hugging Face folder that serves.

CHECKPOINT is a run's folder or its checkpoints/, what convert_hf_to_megatron.py wrote, or one
step's folder, saved in any layout. Its checksums are verified first. One tensor is in memory at a
time; what was written is read back and compared bit for bit before OUTPUT takes its place. Config,
generation config, tokenizer and chat template go along.
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
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's or a step's folder")
    parser.add_argument(
        "--hf-model",
        type=Path,
        help="gives config and tokenizer (default: what the checkpoint was made from)",
    )
    parser.add_argument("--step", type=int, help="of a run's checkpoints (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32", "fp8"],
        help="of the weights (default: the checkpoint's; its weights are converted, not Adam's "
        "fp32 copy). fp8: e4m3 with a scale for each block of 128 x 128, as DeepSeek publishes; "
        "embedding, LM head, norms and routers stay in bf16",
    )
    add_output_arguments(parser)
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    from megatron_prefix.mcore.crew import torchrun_crew

    with torchrun_crew() as crew:
        convert(args, crew)
    return 0


def convert(args: argparse.Namespace, crew: "Crew") -> None:
    from megatron_prefix.mcore.contents import find_hf_model, read_step, verify
    from megatron_prefix.mcore.fp8_blocks import cut_blocks
    from megatron_prefix.mcore.progress_bar import byte_progress
    from megatron_prefix.mcore.source import open_config, parameters
    from megatron_prefix.mcore.steps import checkpoints_of, find_step
    from megatron_prefix.mcore.tool import check_output, check_ranks, check_room, done, gib

    check_ranks(args.ranks, crew.size)
    inputs = (checkpoints_of(args.checkpoint), args.hf_model)
    crew.lead(lambda: check_output(args.output, *inputs, overwrite=args.overwrite))
    step = crew.alike(lambda: find_step(args.checkpoint, args.step))
    hf = crew.alike(lambda: open_config(args.hf_model or find_hf_model(step)))
    saved = crew.alike(lambda: read_step(step))
    adapt_to_cpu()  # before any import of Megatron, which says much
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_hf import megatron_to_hf

    verified = crew.lead(lambda: verify(step))  # all of it, once
    dtype = args.dtype or saved.params_dtype
    job = Conversion(hf, args.output, dtype, args.ranks, crew=crew)
    what = (
        f"step {saved.run_state['step']} of {step} ({verified} files verified), "
        f"{hf.config['architectures'][0]}, {parameters(hf):,} parameters, "
        f"{gib(job.bytes)} in {dtype}"
    )
    crew.lead(lambda: check_room(args.output, 0 if args.dry_run else job.bytes))
    label = "checking" if args.dry_run else "converting"
    with byte_progress(label, job.bytes // crew.size, show=crew.rank == 0) as advance:
        megatron_to_hf(job, saved, advance, dry_run=args.dry_run)
    done(args, what, crew.rank)
    if crew.rank == 0 and dtype == "fp8" and (cut := cut_blocks(hf)):
        print(f"note: {served_in_fp8(cut)}", file=sys.stderr)


def served_in_fp8(cut: list[str]) -> str:
    more = f" and {len(cut) - 1} more" if cut[1:] else ""
    return (
        f"SGLang refuses these weights in FP8: it joins {cut[0]}{more} to others, and the rows are "
        "no multiple of 128; Megatron reads them as a teacher's; for a server choose bf16"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_tool("convert_megatron_to_hf", lambda: work(args), writes=True)


if __name__ == "__main__":
    sys.exit(main())
