"""What a teacher elsewhere must send for a token: hidden states, logits, or its top k.

Two ranks over gloo on this machine, as a separate teacher and a student's last stage are: receives
are posted two microbatches ahead, sends wait for the one two before. Bytes are counted at the
sender as tensors go out; milliseconds are the receiver's, from one microbatch to the next, medians
over repeats in which the kinds alternate. Values are random: nothing is computed here.

``--server`` adds what a real SGLang server answers for SORT-CHAIN's teacher, over HTTP.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks._server_answers import NAME
from benchmarks._server_answers import measure as measure_server
from megatron_prefix.placement import IN_FLIGHT

TEACHER, STUDENT = 1, 0
TOP_K_ASKED = 16  # of the server; SORT-CHAIN has 46 tokens
# Widths and vocabularies of published config.json files; SORT-CHAIN's teacher is in the package.
MODELS = {
    "SORT-CHAIN teacher": (96, 46),
    "Qwen3-32B": (5120, 151_936),
    "Qwen3-235B-A22B": (4096, 151_936),
    "DeepSeek-V3": (7168, 129_280),
}


@dataclass(frozen=True)
class Kind:
    """What is sent of N positions: tensors of these columns and types."""

    name: str
    columns: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def empty(self, positions: int) -> list[torch.Tensor]:
        return [
            torch.zeros((positions, columns), dtype=dtype)
            for columns, dtype in zip(self.columns, self.dtypes, strict=True)
        ]


@dataclass(frozen=True)
class Row:
    model: str
    kind: str
    positions: int  # of a microbatch
    bytes_a_token: float
    mib_a_microbatch: float
    ms_a_microbatch: float


def kinds(width: int, vocabulary: int, top_k: Sequence[int]) -> list[Kind]:
    """Hidden states and logits in bf16; top k as int32 ids and float32 log-probabilities."""
    both = torch.int32, torch.float32
    return [
        Kind("hidden states", (width,), (torch.bfloat16,)),
        Kind("logits", (vocabulary,), (torch.bfloat16,)),
        *(Kind(f"top {k}", (k, k), both) for k in top_k if k <= vocabulary),
    ]


def send(kind: Kind, positions: int, microbatches: int) -> int:
    """The bytes of all tensors that went out."""
    outgoing: deque[list[dist.Work | None]] = deque()
    sent = 0
    for _ in range(microbatches):
        tensors = kind.empty(positions)
        outgoing.append([dist.isend(tensor, STUDENT) for tensor in tensors])
        sent += sum(tensor.nbytes for tensor in tensors)
        while len(outgoing) > IN_FLIGHT:
            wait(outgoing.popleft())
    while outgoing:
        wait(outgoing.popleft())
    return sent


def receive(kind: Kind, positions: int, microbatches: int) -> list[float]:
    """Seconds from one microbatch's arrival to the next."""
    posted: deque[list[dist.Work | None]] = deque()
    arrivals, start = [], time.perf_counter()
    for index in range(microbatches + IN_FLIGHT):
        if index < microbatches:
            tensors = kind.empty(positions)
            posted.append([dist.irecv(tensor, TEACHER) for tensor in tensors])
        if index >= IN_FLIGHT:
            wait(posted.popleft())
            arrivals.append(time.perf_counter() - start)
            start = time.perf_counter()
    return arrivals[1:]  # the first waits for the sender to begin


def wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None
        work.wait()


def measure(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    positions, microbatches = arguments.positions, arguments.microbatches
    rows: list[Row] = []
    for model, (width, vocabulary) in MODELS.items():
        seconds: dict[str, list[float]] = {}
        sent = torch.zeros(1, dtype=torch.int64)
        for _ in range(arguments.repeats):
            for kind in kinds(width, vocabulary, arguments.top_k):
                dist.barrier()
                if rank == TEACHER:
                    sent += send(kind, positions, microbatches)
                    dist.send(sent, STUDENT)
                    sent.zero_()
                    continue
                seconds.setdefault(kind.name, []).extend(receive(kind, positions, microbatches))
                dist.recv(sent, TEACHER)
                a_token = int(sent) / microbatches / positions
                size = a_token * positions / 2**20
                ms = 1e3 * statistics.median(seconds[kind.name])
                row = Row(model, kind.name, positions, a_token, size, ms)
                rows = [r for r in rows if (r.model, r.kind) != (model, kind.name)] + [row]
    if rank == STUDENT:
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"A microbatch of {rows[0].positions} prefix tokens, over gloo on one host")
    for name in ("teacher", "sent", "bytes a token", "MiB a microbatch", "ms a microbatch"):
        table.add_column(name, justify="left" if name in ("teacher", "sent") else "right")
    for row in rows:
        table.add_row(
            row.model,
            row.kind,
            f"{row.bytes_a_token:,.0f}",
            f"{row.mib_a_microbatch:,.2f}",
            f"{row.ms_a_microbatch:,.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    parser.add_argument("--positions", type=int, default=0, help="prefix tokens (512; --quick 64)")
    parser.add_argument("--microbatches", type=int, default=4, help="of each burst")
    parser.add_argument("--repeats", type=int, default=0, help="bursts (5; --quick 2)")
    parser.add_argument("--top-k", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--server", action="store_true", help="also ask a real SGLang server")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    arguments.positions = arguments.positions or (64 if arguments.quick else 512)
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        ranks = [
            context.Process(target=measure, args=(rank, Path(name), arguments)) for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed; its traceback is above")
        rows = [Row(**row) for row in json.loads((Path(name) / "rows.json").read_text())]
    if arguments.server:
        for kind, size, ms in measure_server(arguments.positions, arguments.repeats, TOP_K_ASKED):
            mib = size * arguments.positions / 2**20
            rows.append(Row(f"{NAME}, HTTP", kind, arguments.positions, size, mib, ms))
    show(rows)
    if arguments.json:
        text = json.dumps({"rows": [asdict(row) for row in rows]}, indent=1)
        arguments.json.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
