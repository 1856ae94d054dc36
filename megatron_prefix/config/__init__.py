"""Every setting of a run, as frozen dataclasses. Imports neither torch nor Megatron.

A recipe (``recipes/*.py``) returns a :class:`Recipe`; ``recipe/`` lays a YAML overlay and typed
dotted overrides over it. An empty string, an empty tuple or 0 says "not set" where that makes
sense; each field's comment says what it means then. Names that Megatron has are Megatron's.
"""

from dataclasses import dataclass, field

from megatron_prefix.config.modes import ModeConfig, StopTokensConfig
from megatron_prefix.config.modes import TeacherPromptConfig as TeacherPromptConfig
from megatron_prefix.config.modes import WrittenConfig as WrittenConfig
from megatron_prefix.config.prefix import AdaptiveConfig as AdaptiveConfig
from megatron_prefix.config.prefix import AnchoredConfig as AnchoredConfig
from megatron_prefix.config.prefix import AuditedConfig as AuditedConfig
from megatron_prefix.config.prefix import CosineConfig as CosineConfig
from megatron_prefix.config.prefix import CutOffConfig as CutOffConfig
from megatron_prefix.config.prefix import LateConfig as LateConfig
from megatron_prefix.config.prefix import LinearConfig as LinearConfig
from megatron_prefix.config.prefix import MarginalConfig as MarginalConfig
from megatron_prefix.config.prefix import OverlapConfig as OverlapConfig
from megatron_prefix.config.prefix import PrefixConfig
from megatron_prefix.config.prefix import RecallConfig as RecallConfig
from megatron_prefix.config.prefix import StepsConfig as StepsConfig
from megatron_prefix.config.prefix import WindowConfig as WindowConfig
from megatron_prefix.config.teacher import TeacherServerConfig as TeacherServerConfig


@dataclass(frozen=True)
class Fp8Config:
    """Transformer Engine FP8 for a trunk. LM heads and the KL always stay out of it."""

    format: str = "off"  # off | e4m3 | hybrid (TransformerConfig.fp8)
    recipe: str = "blockwise"  # blockwise | tensorwise | delayed (TransformerConfig.fp8_recipe)
    first_last_layers_bf16: bool = True  # not with delayed: Megatron-Core refuses it


@dataclass(frozen=True)
class ModelConfig:
    """One Hugging Face checkpoint and the layout in which Megatron-Core holds it."""

    hf_path: str = ""  # folder with config.json and safetensors
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # Layers on the first stage where they do not divide over the stages; 0: as even as can be.
    num_layers_in_first_pipeline_stage: int = 0
    expert_model_parallel_size: int = 1  # ranks that share the experts of a mixture's layers
    # Ranks that each expert is cut over; 0: as tensor_model_parallel_size.
    expert_tensor_parallel_size: int = 0
    # Ranks that share the tokens of each microbatch, two pieces of every sequence on each.
    context_parallel_size: int = 1
    # Split activations between tensor-parallel regions too; needed for experts above TP 1.
    sequence_parallel: bool = False
    params_dtype: str = "bf16"  # bf16 | fp32
    recompute_granularity: str = "none"  # none | selective | full
    fp8: Fp8Config = field(default_factory=Fp8Config)
    # Of a teacher alone: colocated, on the student's ranks; separate, on ranks of its own that
    # follow the student's in one world; server, behind SGLang servers (docs/teachers.md).
    placement: str = "colocated"
    # Of a colocated teacher: its weights lie in host memory while the student steps.
    offload: bool = False
    world_size: int = 0  # ranks of a separate teacher; 0: the least that its layout needs
    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)


@dataclass(frozen=True)
class DataConfig:
    """Prompts, through ``datasets``."""

    path: str = ""  # a .jsonl/.json/.parquet file, a folder of them, or a hub id
    name: str = ""  # the hub data set's configuration
    split: str = "train"
    streaming: bool = False
    prompt_column: str = "prompt"  # of texts, or of lists of {role, content} messages
    # auto: the tokenizer's chat template where it has one; always; never: the column's bare text
    chat_template: str = "auto"
    system_prompt: str = ""  # put before messages that have none; needs a chat template
    max_prompt_length: int = 1024  # tokens
    overlong: str = "drop"  # drop (counted and logged) | error
    # Names each prompt's teacher: a key of `teachers`, or "teacher" for the one of that section;
    # empty: that one teaches every prompt.
    domain_column: str = ""
    seed: int = 0  # of the shuffle
    shuffle: bool = True


@dataclass(frozen=True)
class RolloutConfig:
    """SGLang servers: how they are reached, started, asked and kept in step."""

    server_urls: tuple[str, ...] = ()  # running servers; empty: start num_servers here
    # Of the key of the servers at server_urls: a file that holds it, with mode 600, or the variable
    # that does, as ${oc.env:NAME}; never the key itself, which would be recorded.
    api_key_file: str = ""
    api_key: str = ""
    num_servers: int = 1  # that are started; on a cluster, on each server node
    device: str = "auto"  # auto | cuda | cpu: where servers that we start run
    dtype: str = "auto"  # auto: the student's params_dtype
    server_tensor_parallel_size: int = 1  # GPUs of each server
    # Index of the first GPU that the servers use; -1: the one after the ranks' GPUs where there are
    # enough, otherwise the ranks' first: they are shared.
    first_gpu: int = -1
    max_total_tokens: int = 0  # of the servers' cache; 0: SGLang decides (60000 on a CPU)
    server_args: tuple[str, ...] = ()  # more arguments for sglang.launch_server
    start_timeout_s: float = 300.0  # a server that answers later has failed
    request_timeout_s: float = 600.0  # without a byte of an answer; then the server is given up
    hang_timeout_s: float = 120.0  # a server without a passed health check so long is given up
    server_restarts: int = 5  # of one server, each within ten minutes of the last
    retries: int = 4  # of a request, with exponential backoff
    # Rollouts of each prompt: a step has train.global_batch_size / samples_per_prompt prompts.
    samples_per_prompt: int = 1
    temperature: float = 1.0  # of sampling, above 0; evaluations are greedy
    over_sample: float = 1.0  # requests started / rollouts wanted; above 1, stragglers are aborted
    # Where stragglers are aborted: share of wanted prefix tokens an aborted rollout must have
    # to be kept (its finish_reason is "abort"); above 1 none is kept.
    keep_aborted_above: float = 2.0
    weight_sync: str = "distributed"  # distributed | disk
    # auto | nccl | gloo: of the group that weights go through. auto: nccl on GPUs, but gloo, by way
    # of host memory, where a server has rank 0's GPU, which NCCL refuses.
    weight_backend: str = "auto"
    sync_timeout_s: float = 120.0  # of one collective with the servers
    bucket_mib: float = 512.0  # of one streamed weight bucket
    verify_weights_every: int = 50  # syncs between two checksum proofs; 1: every one; 0: first only
    # Largest difference of a rollout's log-probability between server and trainer, same tokens.
    logprob_tolerance: float = 0.25
    record: bool = False  # keep each step's rollouts in the run folder
    replay: str = ""  # a folder of recorded rollouts to train on instead of asking a server


@dataclass(frozen=True)
class TokenWeightConfig:
    """How much a prefix token counts, from what the teacher made of its rollout: after sampling,
    which it does not shorten."""

    # uniform | discrepancy (less, the further the rollout has drifted from the teacher) |
    # change_point (nothing, once the teacher's margin has dropped) | entropy (nothing but where the
    # student is least sure) | reward (nothing where the teacher finds the token far less likely
    # than the student: where loss.mixture clips)
    rule: str = "uniform"
    explore: float = 0.0  # first share of the steps, by rule reward whatever the rule says
    scale: float = 8.0  # discrepancy: nats of ln p_student - ln p_teacher that divide by e
    floor: float = 0.05  # discrepancy: least weight, beside 1 for a rollout's first token
    min_tokens: int = 16  # change_point: tokens on each side of it
    strength: float = 1.0  # change_point: multiple of the Bayesian information criterion's bar
    share: float = 0.5  # entropy: of the step's tokens, those of the highest student entropy


@dataclass(frozen=True)
class LossConfig:
    """Token-level divergence over the full vocabulary, on prefix positions."""

    # reverse_kl KL(student||teacher) | forward_kl | jsd | relaxed_kl (reverse_kl, clipped where the
    # teacher finds a token far less likely than the student)
    divergence: str = "reverse_kl"
    beta: float = 0.5  # jsd: the teacher's share of the mixture
    # relaxed_kl: lambda; ln p_teacher - ln p_student counts as ln(lambda / (1 - lambda)) at least.
    mixture: float = 0.2
    # Divides both models' logits in the loss, without a factor of temperature squared.
    temperature: float = 1.0
    chunk_size: int = 0  # positions a chunk; 0: chosen by the loss
    weights: TokenWeightConfig = field(default_factory=TokenWeightConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """Megatron's optimizer and OptimizerParamScheduler."""

    lr: float = 1e-5  # the highest learning rate, reached after lr_warmup_steps
    min_lr: float = 0.0  # at the last step, where lr decays
    lr_warmup_steps: int = 0  # of linear warm-up from 0; fewer than train.steps
    lr_decay_style: str = "linear"  # linear | cosine | constant | inverse-square-root
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.95  # decay of the mean of squared gradients
    adam_eps: float = 1e-8  # added to the root in the denominator
    weight_decay: float = 0.0  # decoupled, as AdamW's
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping
    use_distributed_optimizer: bool = True  # Adam's state sharded over data-parallel ranks
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100  # schedules of prefix length and learning rate span them
    global_batch_size: int = 64  # rollouts a step, over all data-parallel ranks
    micro_batch_size: int = 8  # sequences that are packed into one microbatch
    seed: int = 0  # of the servers' sampling and of the ranks' random state
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops


@dataclass(frozen=True)
class CheckpointConfig:
    """Megatron's distributed checkpoints under the run folder."""

    # Where the run has none of its own: the student's first weights, out of a folder that
    # tools/convert_hf_to_megatron.py wrote, or out of another run's checkpoints (the newest).
    # student.hf_path still gives config and tokenizer; empty: its weights too.
    load: str = ""
    save_interval: int = 0  # steps; 0: only at the end and on a signal
    async_save: bool = True  # write beside the next steps
    keep_last: int = 2  # 0: keep all
    keep_every: int = 0  # checkpoints of its multiples are kept as well; 0: none
    verify_integrity: bool = True  # a sum of every file, checked at load
    export_hf: bool = True  # write a Hugging Face folder of the student at the end


@dataclass(frozen=True)
class EvalConfig:
    """Greedy answers through the servers on a held-out set. The prefix never limits them."""

    path: str = ""  # as data.path; empty: no evaluation
    name: str = ""  # the hub data set's configuration
    split: str = "train"
    prompt_column: str = "prompt"
    answer_column: str = "answer"  # of texts that the scorer compares with
    scorer: str = "math"  # math (math-verify) | exact | suffix, or "package.module:function"
    max_new_tokens: int = 1024  # longer answers are cut and count as truncated
    samples: int = 200  # the first of the set; 0: all
    interval: int = 0  # steps; 0: before and after only
    # The last of the run's servers, so many of them, answer these alone: they keep a step's weights
    # while training goes on. 0: the servers of the rollouts answer, and training waits.
    own_servers: int = 0
    stop_wait_s: float = 60.0  # own_servers: a run that is stopped waits so long for their answers


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True
    log_interval: int = 1  # steps between two progress lines, and TensorBoard's scalars
    kl_by_position_interval: int = 10  # steps between two images of the KL; 0: none
    sample_rollouts_interval: int = 25  # steps between two entries of samples.jsonl; 0: none
    sample_rollouts: int = 4  # rollouts in each
    # Steps between two probes: a few full-length rollouts that the teacher scores and that are not
    # trained on. They show the KL beyond the prefix; 0: none.
    probe_interval: int = 0
    probe_rollouts: int = 8  # of the same prompts each time
    # Cosine of the gradients of the prefix and of the full rollouts at each probe: two passes
    # forward and backward over its rollouts, and host memory for one gradient.
    probe_agreement: bool = True
    # A probe warns where its tail KL is so many times the lowest seen at these positions; 0: never.
    alarm_tail: float = 1.25
    alarm_agreement: float = 0.2  # a probe warns where the gradients agree less; 0: never
    metrics_port: int = 0  # of a page for Prometheus on rank 0's machine; 0: none
    metrics_host: str = "127.0.0.1"  # "job": this machine's address on the ranks' network


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    output_dir: str = "runs"  # the run folder is output_dir/name
    # Ranks in all, a separate teacher's included; 0: the least that the layouts need.
    world_size: int = 0
    # Time limit of every collective; ranks without progress are found at 90% of it. What gets on,
    # a long rollout or a save, may take longer.
    distributed_timeout_s: float = 600.0
    # Of one card, for `plan`, `train` and `launch` to check; 0: what the machine that trains has.
    gpu_memory_gib: float = 0.0
    # Of it, for the CUDA context, NCCL's buffers and the allocator's fragments.
    gpu_reserve_gib: float = 6.0
    check_memory: bool = True  # refuse to start what `plan` says does not fit
    # Of all ranks in place, on one machine, after one was killed or hung.
    max_restarts: int = 3


@dataclass(frozen=True)
class Recipe:
    """A whole run. ``validate/`` holds the checks that need more than one field."""

    run: RunConfig = field(default_factory=RunConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig)
    teachers: dict[str, ModelConfig] = field(default_factory=dict)  # more, by data.domain_column
    data: DataConfig = field(default_factory=DataConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    stop_tokens: StopTokensConfig = field(default_factory=StopTokensConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
