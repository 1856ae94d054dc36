"""Turns a Megatron distributed checkpoint into a Hugging Face folder that serves.

CHECKPOINT is a run's checkpoints/ folder, what convert_hf_to_megatron.py wrote, or one step's
folder, saved in any layout. Its checksums are verified first; what was written is read back and
compared with the checkpoint bit for bit before it takes its place. Config, generation config,
tokenizer and chat template go along.
"""

import argparse
import sys
from pathlib import Path

from megatron_prefix.mcore.cpu import adapt_to_cpu


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's or a step's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--hf-model",
        type=Path,
        help="gives config and tokenizer (default: what the checkpoint was made from)",
    )
    parser.add_argument("--step", type=int, help="of a run's checkpoints (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp32"],
        help="of the weights (default: the checkpoint's; its weights are converted, not Adam's "
        "fp32 copy)",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that share the layers, and the memory"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once whole")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    adapt_to_cpu()  # before any import of Megatron
    from megatron_prefix.mcore.contents import check_manifest, find_hf_model, find_step, read_step
    from megatron_prefix.mcore.convert import Conversion, megatron_to_hf
    from megatron_prefix.mcore.source import open_config, parameters
    from megatron_prefix.mcore.tool import check_output, check_ranks, gib

    check_output(args.output, overwrite=args.overwrite)
    step = find_step(args.checkpoint, args.step)
    hf_model = args.hf_model or find_hf_model(step)
    hf = open_config(hf_model)
    check_ranks(args.ranks, hf.shape.num_layers)
    verified = check_manifest(step)
    saved = read_step(step)
    dtype = args.dtype or saved.params_dtype
    size = parameters(hf) * (4 if dtype == "fp32" else 2)
    what = (
        f"step {saved.run_state['step']} of {step} ({verified} files verified), "
        f"{hf.config['architectures'][0]}, {parameters(hf):,} parameters, {gib(size)} in {dtype}"
    )
    job = Conversion(hf_model, args.output, dtype, args.ranks, step)
    megatron_to_hf(job, dry_run=args.dry_run)
    print(f"{'would write' if args.dry_run else 'wrote'} {args.output}: {what}")
    return 0


def main(argv: list[str] | None = None) -> int:
    from megatron_prefix.mcore.tool import run_tool

    args = parse_args(argv)
    return run_tool("convert_megatron_to_hf", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
