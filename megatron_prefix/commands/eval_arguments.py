"""The arguments of ``megatron-prefix eval``. Imports nothing heavy: ``--help`` is quick."""

import argparse
import re

# Data sets by a short name: where they lie on the hub, and what their columns are called.
KNOWN_SETS: dict[str, dict[str, str]] = {
    "gsm8k": {"path": "openai/gsm8k", "name": "main", "split": "test", "prompt_column": "question"},
    "math500": {"path": "HuggingFaceH4/MATH-500", "split": "test", "prompt_column": "problem"},
    "aime24": {"path": "HuggingFaceH4/aime_2024", "split": "train", "prompt_column": "problem"},
    "amc": {"path": "AI-MO/aimo-validation-amc", "split": "train", "prompt_column": "problem"},
}
EXAMPLES = """\
examples:
  megatron-prefix eval runs/quickstart                       the run's own set and limits
  megatron-prefix eval Qwen3-8B --data gsm8k/test.jsonl --prompt-column question
  megatron-prefix eval Qwen3-8B --data math500
  megatron-prefix eval Qwen3-8B --data aime.json --prompt-column problem \\
      --n 16 --temperature 0.7 --max-new-tokens 16384        avg@16, pass@2 ... pass@16
Answers are kept as they come: run the same command again to resume.
"""


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or a run's folder")
    parser.add_argument("--step", type=int, help="a run's step (default: its last)")
    _add_questions(parser.add_argument_group("questions (of a run: its recipe's, if not given)"))
    _add_answers(parser.add_argument_group("answers"))
    parser.add_argument("--output", metavar="DIR", help="default: RUN/evals/DATA, evals/MODEL/DATA")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object")


def in_options(told: str) -> str:
    """An error's words with the options of this command in place of a recipe's settings."""

    def option(found: re.Match[str]) -> str:
        name = {"path": "data", "name": "data-name"}.get(found[1], found[1].replace("_", "-"))
        return f"--{name} "

    names = "path|name|split|prompt_column|answer_column|scorer|samples|max_new_tokens"
    return re.sub(rf"\beval\.({names})=", option, told)


def _add_questions(group: "argparse._ArgumentGroup") -> None:
    known = ", ".join(KNOWN_SETS)
    group.add_argument("--data", metavar="PATH", help=f"a file, a hub id, or one of {known}")
    group.add_argument("--data-name", metavar="NAME", help="the hub data set's configuration")
    group.add_argument("--split", metavar="NAME")
    group.add_argument("--prompt-column", metavar="NAME")
    group.add_argument("--answer-column", metavar="NAME")
    group.add_argument("--scorer", help="math, exact, suffix, or package.module:function")
    group.add_argument("--samples", type=int, metavar="N", help="the first N problems; 0: all")
    group.add_argument("--chat-template", help="auto, always or never")
    group.add_argument("--system-prompt", metavar="TEXT")
    group.add_argument("--max-prompt-length", type=int, metavar="TOKENS")


def _add_answers(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--max-new-tokens", type=int, metavar="TOKENS")
    group.add_argument("--n", type=int, default=1, help="answers a problem (default: 1)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--servers", type=int, default=1, metavar="N", help="default: 1")
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="of each")
    group.add_argument("--device", default="auto", help="auto, cuda or cpu")
    group.add_argument("--dtype", default="auto", help="auto (the folder's), bf16, fp16 or fp32")
