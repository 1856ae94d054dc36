"""Holds one checkpoint in transformers against Megatron at a layout, and against a running server.

transformers continues random prompts greedily; Megatron is fed the same tokens on ranks of this
machine, the server is asked for its own greedy continuation. Compared are the greedy tokens, the
log-probabilities of the tokens, and for Megatron the output of every layer. Exit code 1: they part.
"""

import argparse
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
TOLERANCES = {"fp32": (1e-4, 1e-4), "bf16": (0.25, 0.05)}  # nats, share of a layer's largest value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-model", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel")
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
    adapt_to_cpu()  # before any import of Megatron
    from megatron_prefix.config import ModelConfig
    from megatron_prefix.layout import least_world_size
    from megatron_prefix.mcore import parity
    from megatron_prefix.mcore.source import open_source
    from megatron_prefix.rollout.client import Endpoint, SglangClient
    from megatron_prefix.validate import check_model

    _, hf = open_source(args.hf_model)
    config = ModelConfig(
        hf_path=str(args.hf_model),
        params_dtype=args.dtype,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        expert_model_parallel_size=args.ep,
        expert_tensor_parallel_size=1 if hf.shape.num_experts else 0,
        sequence_parallel=args.tp > 1,
    )
    world_size = least_world_size(config)
    check_model(hf, config, "model")
    if args.dry_run:
        print(f"would compare {args.hf_model} on {world_size} ranks, {args.server or 'no server'}")
        return 0
    console = Console(stderr=True)
    with console.status("transformers"):
        prompts = parity.random_prompts(hf, args.prompts, args.prompt_tokens, args.seed)
        reference, rollouts = parity.reference_view(
            args.hf_model, prompts, args.new_tokens, args.dtype
        )
    views = {}
    with console.status(f"Megatron on {world_size} ranks"):
        views[f"Megatron tp{args.tp} pp{args.pp} ep{args.ep}"] = parity.megatron_view(
            config, world_size, rollouts
        )
    if args.server:
        key = args.api_key_file.read_text().strip() if args.api_key_file else ""
        with console.status(args.server), SglangClient(Endpoint(args.server, key)) as client:
            views[args.server] = ask_server(client, rollouts)
    tolerance, of_layers = TOLERANCES[args.dtype]
    found = {name: parity.compare(reference, view, of_layers) for name, view in views.items()}
    Console().print(table(found, hf.shape.num_layers))
    limit = tolerance if args.tolerance is None else args.tolerance
    return 0 if all(difference.agrees(limit) for difference in found.values()) else APART


def ask_server(client: "SglangClient", rollouts: "list[Rollout]") -> "View":
    """ValueError in one line where the server cannot be reached or refuses."""
    from megatron_prefix.mcore.parity import server_view
    from megatron_prefix.rollout.protocol import RequestRefused, ServerUnavailable

    try:
        return server_view(client, rollouts)
    except (RequestRefused, ServerUnavailable) as error:
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
