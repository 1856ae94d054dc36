"""Holds one checkpoint in transformers against Megatron at a layout, and against a running server.

transformers continues random prompts greedily; Megatron is fed the same tokens on ranks of this
machine, the server is asked for its own greedy continuation. Compared are the greedy tokens, the
log-probabilities of the tokens, and for Megatron the output of every layer. Exit code 1: they part.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_prefix.mcore.cpu import adapt_to_cpu

if TYPE_CHECKING:
    from megatron_prefix.mcore.parity import Difference, View
    from megatron_prefix.rollout.client import SglangClient
    from megatron_prefix.types import Rollout

APART = 1
REACHED_WITHIN_S = 20.0
TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (0.25, 0.05)}  # nats, share of a layer's largest value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-model", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel")
    parser.add_argument("--cp", type=int, default=1, help="context parallel")
    parser.add_argument("--etp", type=int, help="tensor parallel of experts (default: 1)")
    parser.add_argument("--dtype", choices=sorted(TOLERANCES), default="fp32")
    parser.add_argument("--server", default="", help="URL of a server of the same checkpoint")
    parser.add_argument("--api-key-file", type=Path, help="holds the server's key")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=24, help="of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, help="of log-probabilities, in nats")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and the layout")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    from megatron_prefix.config import ModelConfig
    from megatron_prefix.layout import least_world_size
    from megatron_prefix.mcore.source import open_source
    from megatron_prefix.validate import check_model

    check_numbers(args)
    _, hf = open_source(args.hf_model)
    check_lengths(args, hf.shape.max_position_embeddings)
    config = ModelConfig(
        hf_path=str(args.hf_model),
        params_dtype=args.dtype,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        expert_model_parallel_size=args.ep,
        context_parallel_size=args.cp,
        expert_tensor_parallel_size=args.etp or int(hf.shape.num_experts > 0),
        sequence_parallel=args.tp > 1,
    )
    world_size = least_world_size(config)
    check_model(hf, config, "model")
    client = reach_server(args) if args.server else None
    if args.dry_run:
        print(f"would compare {args.hf_model} on {world_size} ranks, {args.server or 'no server'}")
        return 0
    adapt_to_cpu()  # before any import of Megatron, which says much
    from megatron_prefix.mcore import parity

    console = Console(stderr=True)
    with console.status("transformers"):
        prompts = parity.random_prompts(hf, args.prompts, args.prompt_tokens, args.seed)
        reference, rollouts = parity.reference_view(
            args.hf_model, prompts, args.new_tokens, args.dtype
        )
    views = {}
    with console.status(f"Megatron on {world_size} ranks"):
        views[layout_name(args)] = parity.megatron_view(config, world_size, rollouts)
    if client:
        with console.status(args.server), client:
            views[args.server] = ask_server(client, rollouts)
    tolerance, of_layers = TOLERANCES[args.dtype]
    found = {name: parity.compare(reference, view, of_layers) for name, view in views.items()}
    Console().print(table(found, hf.shape.num_layers))
    for name, difference in found.items():
        if difference.not_finite:
            print(f"{name}: values that are not finite ({difference.not_finite})")
    limit = tolerance if args.tolerance is None else args.tolerance
    return 0 if all(difference.agrees(limit) for difference in found.values()) else APART


def layout_name(args: argparse.Namespace) -> str:
    sizes = {"tp": args.tp, "pp": args.pp, "ep": args.ep, "cp": args.cp, "etp": args.etp}
    always = ("tp", "pp", "ep")
    shown = [f"{k}{size}" for k, size in sizes.items() if k in always or (size or 1) > 1]
    return f"Megatron {' '.join(shown)}"


def check_numbers(args: argparse.Namespace) -> None:
    """ValueError for what cannot be, whatever the model."""
    names = ("tp", "pp", "ep", "cp", "prompts", "prompt_tokens", "new_tokens")
    sizes = {name: getattr(args, name) for name in names}
    sizes |= {} if args.etp is None else {"etp": args.etp}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name.replace('_', '-')} {size} must be 1 or more")
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance {args.tolerance} must be 0 or more, in nats")
    if args.server and not args.server.startswith(("http://", "https://")):
        raise ValueError(f"--server {args.server} is no URL; give http://HOST:PORT")
    if args.api_key_file and not args.api_key_file.is_file():
        raise ValueError(f"--api-key-file {args.api_key_file} is no file; name one with the key")


def check_lengths(args: argparse.Namespace, most: int) -> None:
    length = args.prompt_tokens + args.new_tokens
    if length > most:
        raise ValueError(
            f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are {length} "
            f"tokens, and max_position_embeddings is {most}; ask for fewer"
        )


def reach_server(args: argparse.Namespace) -> "SglangClient":
    """A client of --server, which answers; ValueError in one line where it does not."""
    from megatron_prefix.rollout.client import Endpoint, SglangClient
    from megatron_prefix.rollout.protocol import SglangError

    key = args.api_key_file.read_text().strip() if args.api_key_file else ""
    client = SglangClient(Endpoint(args.server, key))
    try:
        client.model_info(timeout_s=REACHED_WITHIN_S, retries=0)
    except SglangError as error:
        raise ValueError(f"--server {args.server}: {error}") from error
    return client


def ask_server(client: "SglangClient", rollouts: "list[Rollout]") -> "View":
    """ValueError in one line where the server cannot be reached or refuses."""
    from megatron_prefix.mcore.parity import server_view
    from megatron_prefix.rollout.protocol import SglangError

    try:
        return server_view(client, rollouts)
    except SglangError as error:
        raise ValueError(str(error)) from error


def table(found: "dict[str, Difference]", num_layers: int) -> Table:
    rows = Table(
        "against transformers", "tokens", "other tokens", "largest log-probability difference"
    )
    rows.add_column("first layer apart")
    rows.add_column("largest layer difference")
    for name, difference in found.items():
        seen = "Megatron" in name
        layer = difference.first_layer_apart
        rows.add_row(
            name,
            str(difference.tokens),
            str(difference.other_tokens),
            f"{difference.largest_logprob:.2e}",
            (f"{layer} of {num_layers}" if layer >= 0 else "none") if seen else "not seen",
            f"{difference.largest_layer:.1e}" if seen else "",
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    from megatron_prefix.mcore.tool import run_tool

    args = parse_args(argv)
    return run_tool("check_parity", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
