"""One checkpoint in transformers, in Megatron at a layout and behind an SGLang server, on the same
tokens: greedy tokens, log-probabilities, and the first layer where they part.

transformers decides the tokens greedily; the others are fed, or asked for, the same.
Legend: B sequences, T tokens of all of them, N sampled positions of all of them, V vocabulary,
H hidden size. A sequence's last token is fed to none: it predicts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.batch import pack, padded_for, plan_microbatches, sequence_length
from megatron_prefix.config import ModelConfig
from megatron_prefix.context_shares import share_of, zigzag
from megatron_prefix.layout import Layout, model_layout
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import HfModel, read_hf_model
from megatron_prefix.mcore.hf_map.units import hf_tensors
from megatron_prefix.mcore.model import DTYPES, MegatronModel, build_model
from megatron_prefix.mcore.ranks import run_on_ranks
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.mcore.tensor_files import HfReader
from megatron_prefix.mcore.weights import load_hf_weights
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.types import PrefixBatch, Rollout


@dataclass(frozen=True)
class View:
    """What one engine makes of the sequences."""

    tokens: tuple[tuple[int, ...], ...]  # [B][L_i], the greedy choice at each sampled position
    logprobs: tuple[Tensor, ...]  # [B] of [L_i], of the reference's tokens at the same positions
    layers: tuple[Tensor, ...] = ()  # [T, H] after each layer, before the last norm
    not_finite: str = ""  # the first place of a value that is not: "layer 3", "logits"


@dataclass(frozen=True)
class Difference:
    """How far one engine's answers are from those of transformers on the same prompts."""

    tokens: int  # compared
    other_tokens: int  # where the greedy choice is another
    largest_logprob: float  # difference, over the tokens compared
    first_layer_apart: int  # from 0; -1: none, or not seen
    largest_layer: float  # relative difference of any layer's output
    not_finite: str = ""  # whose value is not, and where; equal as two may look, nothing was shown

    def agrees(self, tolerance: float) -> bool:
        near = self.largest_logprob <= tolerance
        same = self.other_tokens == 0 and self.first_layer_apart < 0
        return near and same and not self.not_finite


def random_prompts(hf: HfModel, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of about ``length`` random ids, no two of one length."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [max(1, length - i) for i in range(count)]
    return [
        tuple(torch.randint(hf.shape.vocab_size, (n,), generator=generator).tolist()) for n in sizes
    ]


@torch.no_grad()
def reference_view(
    folder: Path, prompts: Sequence[tuple[int, ...]], new_tokens: int, dtype: str
) -> tuple[View, list[Rollout]]:
    """transformers' greedy continuation, end tokens ignored, and the sequences it makes."""
    model = _transformers_model(folder, DTYPES[dtype])
    rollouts = []
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rollouts.append(
            Rollout(prompt, tuple(ids[len(prompt) :]), (0.0,) * new_tokens, "length", 0, index)
        )
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(_first(output)))
        for layer in model.model.layers
    ]
    logits = [_sampled(model(_fed(rollout)).logits[0], rollout) for rollout in rollouts]
    for hook in hooks:
        hook.remove()
    layers = len(hooks)
    by_layer = [torch.cat([o[0].float() for o in outputs[i::layers]]) for i in range(layers)]
    return _view(logits, rollouts, by_layer), rollouts


def _transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers reads the folder itself; of quantised weights, for which its loader wants
    accelerate and a GPU, it is given what this project's reader makes of them."""
    import transformers

    hf = read_hf_model(str(folder))
    load: Any = getattr(transformers, hf.config["architectures"][0]).from_pretrained
    if not hf.config.get("quantization_config"):
        return load(folder, dtype=dtype).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    reader, names = HfReader(folder), hf_tensors(hf.units)
    weights = {name: reader.rows(name, 0, shape[0]) for name, shape in names.items()}
    return load(None, config=config, state_dict=weights, dtype=dtype).eval()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _fed(rollout: Rollout) -> Tensor:
    return torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]])


def _sampled(logits: Tensor, rollout: Rollout) -> Tensor:
    return logits[len(rollout.prompt_ids) - 1 :]


def _view(logits: Sequence[Tensor], rollouts: Sequence[Rollout], layers: Sequence[Tensor]) -> View:
    """Of [L_i, V] logits a sequence."""
    logprobs = [one.float().log_softmax(-1) for one in logits]
    chosen = [torch.tensor(rollout.prefix_ids)[:, None] for rollout in rollouts]
    return View(
        tuple(tuple(one.argmax(-1).tolist()) for one in logprobs),
        tuple(one.gather(1, ids)[:, 0] for one, ids in zip(logprobs, chosen, strict=True)),
        tuple(layers),
        _not_finite(logits, layers),
    )


def _not_finite(logits: Sequence[Tensor], layers: Sequence[Tensor]) -> str:
    parts = [(f"layer {i}", layer) for i, layer in enumerate(layers)]
    parts += [("logits", one) for one in logits]
    return next((name for name, part in parts if not part.isfinite().all()), "")


def megatron_view(config: ModelConfig, world_size: int, rollouts: Sequence[Rollout]) -> View:
    """Megatron's view on ``world_size`` ranks of this machine."""
    ranks = run_on_ranks(world_size, _on_rank, config, world_size, list(rollouts))
    layout, hf = model_layout(config, world_size), read_hf_model(config.hf_path)
    batch = _batch(rollouts, layout, torch.device("cpu"))
    shares = range(layout.cp)
    parts = [
        torch.cat([ranks[layout.rank(tp, 0, layout.pp - 1, cp)][1] for tp in range(layout.tp)], 1)
        for cp in shares
    ]
    rows = [share.rows.index for cp in shares if (share := share_of(batch, cp, layout.cp)).rows]
    logits = _whole(parts, rows)[:, : hf.shape.vocab_size].split(
        [len(rollout.prefix_ids) for rollout in rollouts]
    )
    tokens = list(zigzag(batch.cu_seqlens, layout.cp)) if layout.cp > 1 else []
    fed = torch.cat(
        [
            start + torch.arange(sequence_length(rollout))
            for start, rollout in zip(batch.cu_seqlens, rollouts, strict=False)
        ]
    )
    layers: list[Tensor] = []
    for stage in range(layout.pp):
        of_shares = [_stage_layers(config, layout, ranks, stage, cp) for cp in shares]
        layers += [_whole(parts, tokens)[fed] for parts in zip(*of_shares, strict=True)]
    return _view(logits, rollouts, layers)


def _stage_layers(
    config: ModelConfig, layout: Layout, ranks: Sequence[Any], stage: int, cp: int
) -> list[Tensor]:
    """[T/cp, H] after each layer of a stage, out of what its tensor-parallel ranks have."""
    shards = [ranks[layout.rank(tp, 0, stage, cp)][0] for tp in range(layout.tp)]
    if not config.sequence_parallel:  # every rank has all tokens
        shards = shards[:1]
    return [torch.cat(parts) for parts in zip(*shards, strict=True)]


def _whole(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """What context-parallel ranks have of it, each at its places; one that is not cut is whole."""
    together = torch.cat(list(parts))
    if not places:
        return together
    whole = torch.empty_like(together)
    whole[torch.cat(list(places))] = together
    return whole


@torch.no_grad()
def _on_rank(
    config: ModelConfig, world_size: int, rollouts: list[Rollout]
) -> tuple[list[Tensor], Tensor | None]:
    """Outputs [T or T/tp, H] of this stage's layers, and on the last stage logits [N, V/tp]; T and
    N of this rank's share of the tokens."""
    initialize_megatron(0)
    groups = build_groups(model_layout(config, world_size))
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner="model", with_head=True)
    load_hf_weights(model)
    model.module.eval()
    outputs: list[Tensor] = []
    for layer in model.module.decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(_first(output)))
    logits = _logits(model, rollouts)
    return [o[:, 0].float().cpu() for o in outputs], logits


def _logits(model: MegatronModel, rollouts: list[Rollout]) -> Tensor | None:
    device = next(model.module.parameters()).device
    batches = [_batch(rollouts, model.groups.layout, device)]

    def head(_batch: object, hidden: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return hidden @ weight.T

    found = run_schedule(model, model.module, batches, head, forward_only=True)
    return found[0].float().cpu() if found else None


def _batch(rollouts: Sequence[Rollout], layout: Layout, device: torch.device) -> PrefixBatch:
    plan = plan_microbatches(rollouts, 1, multiple=8 * layout.tp)
    return pack(rollouts, padded_for(layout.cp, rollouts, plan), 0, device)


def server_view(client: SglangClient, rollouts: Sequence[Rollout]) -> View:
    """A server's own greedy continuation; it may end earlier, at an end token."""
    longest = max(len(rollout.prefix_ids) for rollout in rollouts)
    sampling = Sampling(longest, temperature=0.0)
    answers = client.generate([rollout.prompt_ids for rollout in rollouts], sampling)
    return View(
        tuple(answer.token_ids for answer in answers),
        tuple(torch.tensor(answer.logprobs) for answer in answers),
    )


def compare(reference: View, other: View, layer_tolerance: float) -> Difference:
    """``other`` against transformers. Of a sequence that is sampled anew, what follows the first
    other token is another text and is not compared."""
    compared, wrong, nats = 0, 0, [0.0]
    for b in range(len(reference.tokens)):
        same = [x == y for x, y in zip(reference.tokens[b], other.tokens[b], strict=False)]
        # Megatron was fed the reference's tokens, so each of its positions can be compared.
        if not other.layers and not all(same):
            same = same[: same.index(False) + 1]
        compared += len(same)
        wrong += same.count(False)
        fed = len(same) if other.layers else same.count(True)
        nats += (reference.logprobs[b][:fed] - other.logprobs[b][:fed]).abs().tolist()
    apart = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(reference.layers, other.layers, strict=bool(other.layers))
    ]
    first = next((i for i, value in enumerate(apart) if not value <= layer_tolerance), -1)
    sides = (("transformers", reference), ("here", other))
    return Difference(
        tokens=compared,
        other_tokens=wrong,
        largest_logprob=_largest(nats),
        first_layer_apart=first,
        largest_layer=_largest([0.0, *apart]),
        not_finite=", ".join(f"{who}: {v.not_finite}" for who, v in sides if v.not_finite),
    )


def _largest(values: Sequence[float]) -> float:
    """nan where one is, which max() may lose."""
    return float(torch.tensor(values).max())
