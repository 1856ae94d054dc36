"""Has the teacher of a recipe answer the recipe's prompts, for off-policy, mixed and SFT training.

    python tools/write_answers.py quickstart --output written.jsonl --max-new-tokens 75
    megatron-prefix train quickstart mode.name=off_policy mode.written.path=written.jsonl \\
        mode.written.answer_column=answer_ids

SGLang serves teacher.hf_path here, as rollout.* says (number, device, tensor parallelism). Prompts
are data.path's, written as data.* says. Each line of the output has the prompt, the answer as a
text and as the teacher's own token ids (answer_ids), and whether it ended by itself. Answers are
kept as they come: run the same command again to resume.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from megatron_prefix.data.write_answers import Writing, write_answers
from megatron_prefix.exit_codes import BAD_INPUT, DONE, FAILED, SAVED
from megatron_prefix.recipe import load_recipe, write_own_data
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import SglangError
from megatron_prefix.rollout.server import ServerFailed, server_pool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a file, a name, a module or a record")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, typed")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--rows", type=int, default=0, metavar="N", help="the first N; 0: all")
    parser.add_argument("--answers", type=int, default=1, metavar="N", help="a prompt (1)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="default: the recipe's prefix.max_length"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    return parser.parse_intermixed_args(argv)


def work(args: argparse.Namespace, console: Console) -> int:
    recipe = load_recipe(args.recipe, overrides=args.overrides)
    write_own_data(args.recipe)
    limit = args.max_new_tokens
    writing = Writing(
        recipe,
        args.output,
        rows=args.rows,
        answers_per_prompt=args.answers,
        max_new_tokens=recipe.prefix.max_length if limit is None else limit,
        temperature=args.temperature,
    )
    writing.check()

    @contextlib.contextmanager
    def serve() -> Iterator[list[Endpoint]]:
        console.print("starting SGLang with the teacher")
        with server_pool(
            recipe.teacher.hf_path,
            recipe.rollout,
            params_dtype=recipe.teacher.params_dtype,
            log_folder=args.output.parent / f"{args.output.name}.logs",
            seed=recipe.train.seed,
        ) as servers:
            yield [server.endpoint for server in servers]

    done = write_answers(writing, serve, console)
    print(
        f"wrote {args.output}: {done.answers} answers of {done.tokens} tokens, {done.cut} met the "
        f"limit of {writing.max_new_tokens}, {done.empty} empty ones left out, {done.dropped} "
        "prompts too long to ask"
    )
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    args, console = parse_args(argv), Console(stderr=True)
    try:
        return work(args, console)
    except ValueError as error:
        print(f"write_answers: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; what came is kept: run the same command again to resume", file=sys.stderr)
        return SAVED
    except (SglangError, ServerFailed) as error:
        print(f"write_answers: error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
