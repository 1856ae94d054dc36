"""Finds the servers of a teacher and makes sure that it is the recipe's that they hold."""

import contextlib
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.data.stop_tokens import teacher_mapping
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.model import DTYPES, MegatronModel
from megatron_prefix.modes import section_of, teachers_of
from megatron_prefix.publisher import served_layout
from megatron_prefix.rollout.checksum import WeightHasher, is_compared, verify
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.protocol import SglangError
from megatron_prefix.rollout.scorer import Scorer
from megatron_prefix.rollout.scoring import Vocabulary
from megatron_prefix.safetensors_files import tensor_table
from megatron_prefix.teacher import TeacherLost
from megatron_prefix.teachers.served import read_served, server_settings
from megatron_prefix.teachers.server import ServerTeacher

logger = logging.getLogger(__name__)


def reach_teacher(
    recipe: Recipe,
    domain: str,
    endpoints: Sequence[Endpoint],
    student: MegatronModel,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> ServerTeacher:
    """The teacher of ``domain``, once a server of it answers; ``stack`` closes what it holds.

    Collective over the student's ranks: TeacherLost on all of them, in the same words, where no
    server answers or one holds another model.
    """
    config, groups = teachers_of(recipe)[domain], student.groups
    vocabulary, scorer = shared_vocabulary(recipe, domain, student), None
    name, problem = section_of(domain), ""
    if groups.counts:
        settings = server_settings(recipe, config)
        asked = vocabulary.asked(config.server.top_k)
        scorer = Scorer(endpoints, settings, asked, f"{name}.server")
        stack.callback(scorer.close)
        try:
            there = scorer.meet()
            for endpoint in endpoints if groups.dp_rank == 0 else ():
                if endpoint.url in there:
                    check_server(endpoint, config, name)
        except (SglangError, ValueError, OSError, SafetensorError) as error:
            problem = str(error)
    told = [""] * dist.get_world_size()
    dist.all_gather_object(told, problem)
    for words in filter(None, told):
        raise TeacherLost(words)
    return ServerTeacher(scorer, groups, vocabulary, config.server.top_k, device, domain)


def shared_vocabulary(recipe: Recipe, domain: str, student: MegatronModel) -> Vocabulary:
    """What the ids of a teacher behind servers are to the student."""
    hf = read_served(teachers_of(recipe)[domain].hf_path, section_of(domain))
    theirs, ours = hf.shape.vocab_size, student.hf.shape.vocab_size
    return Vocabulary(theirs, min(theirs, ours), teacher_mapping(recipe))


def check_server(endpoint: Endpoint, config: ModelConfig, section: str) -> None:
    """ValueError where a server holds another model than ``config.hf_path``; SglangError where it
    does not say."""
    hf = read_served(config.hf_path, section)
    with SglangClient(endpoint) as client:
        info = client.model_info()
        architectures, expected = info.get("architectures"), hf.config.get("architectures")
        if architectures != expected:
            raise ValueError(
                f"{endpoint.url} serves {info.get('model_path')}, a {architectures}, and "
                f"{section}.hf_path={config.hf_path} is a {expected}; give the "
                "folder of the model that is served, or start a server of this one"
            )
        if config.server.verify_weights:
            _verify_weights(client, config, hf)
            logger.info("%s holds the weights of %s: checksums agree", endpoint.url, hf.path)
        elif config.server.urls:
            logger.warning(
                "%s serves the architecture of %s; its weights were not compared "
                "(%s.server.verify_weights=true does)",
                endpoint.url,
                hf.path,
                section,
            )


def _verify_weights(client: SglangClient, config: ModelConfig, hf: HfModel) -> None:
    """WeightsDiffer, naming tensors, where the server's checksums are not the folder's."""
    info = client.server_info()
    family = hf.config["architectures"][0]
    if not is_compared(family, info["device"]):
        raise ValueError(
            f"teacher.server.verify_weights=true: SGLang on {info['device']} rearranges a "
            f"{family}, whose checksums are then others than the folder's; set it false"
        )
    hasher = WeightHasher(served_layout(hf, DTYPES[config.params_dtype], info))
    table = tensor_table(hf.path, str(hf.path))
    for file in sorted({entry.file for entry in table.values()}):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if table[name].file == file and not name.startswith(hf.skipped):
                    hasher.add(name, tensors.get_tensor(name))
    verify(client, hasher.checksums())
