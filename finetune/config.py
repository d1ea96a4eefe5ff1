"""Every setting of a run, once: frozen dataclasses, whose fields are the flags, the YAML keys and the help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp4", "nf4"]
ComputeDtype = Literal["auto", "fp32", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
ScheduleName = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    model: str = "smollm2-135m"
    """Local folder, hub name, `.gguf` file, or `smollm2-135m` (embedded, needs no network)."""
    precision: Precision = "nf4"
    """How the base's linear layers are stored. Embeddings, norms and head keep the compute dtype."""
    double_quant: bool = True
    """Quantize the 4-bit blocks' scales as well (saves 0.37 bit a parameter)."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations and of what is not quantized. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation, as transformers names them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: the GPU where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The LoRA adapter (https://arxiv.org/abs/2106.09685)."""

    full: bool = False
    """Train every weight instead of an adapter (needs an unquantized precision)."""
    rank: int = 16
    """Rank r of the update B A."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank (alpha / sqrt(rank) with --rslora)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names to adapt; `all-linear` is every linear layer except the head."""
    dropout: float = 0.0
    """Dropout on the adapter's input, 0 to below 1."""
    rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Initial weights of A (B starts at zero, orthogonal excepted)."""
    adapter_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the adapter's weights, gradients included. auto: fp32 on a CPU, bf16 on a GPU that has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Rows, and how they become tokens."""

    data: str = "pydoc"
    """Local .jsonl/.json/.csv/.parquet file, hub dataset name, or `pydoc` (embedded: the standard library's help topics)."""
    eval_data: str | None = None
    """Held-out rows, as for --data; without it --eval-fraction of --data is held out."""
    eval_fraction: float = 0.1
    """Share of the rows held out when --eval-data is not given, 0 to below 1."""
    seq: int = 512
    """Longest sequence in tokens; longer rows are cut, counted and reported."""
    packing: bool = False
    """Put several rows into one sequence, positions reset and attention kept apart."""
    skip_bad_rows: bool = False
    """Count and list rows that cannot be used, instead of stopping before training."""
    train_on_prompt: bool = False
    """Take the loss on the prompt's tokens too, not on the answer only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The steps."""

    max_steps: int | None = None
    """Optimizer steps; wins over --epochs."""
    epochs: float = 1.0
    """Passes over the data."""
    micro_batch: int = 1
    """Rows in one forward and backward pass."""
    accumulation: int = 16
    """Micro-batches in one optimizer step; gradients are exactly those of the whole window."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Learning rate after warm-up."""
    warmup_steps: int = 5
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip: float = 1.0
    """Largest global gradient norm, once a window; 0 turns clipping off."""
    optimizer: OptimizerName = "paged-adamw"
    """adamw is torch's; the others are bitsandbytes'. Paged state lives in managed memory on a GPU and is ordinary on a CPU."""
    checkpointing: bool = True
    """Recompute activations in backward (non-reentrant): one layer's activations instead of all layers'."""
    offload_activations: bool = False
    """Keep the checkpointed layers' inputs in host memory."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at one time in the loss."""
    seed: int = 0
    """Seed of data order, dropout and initial adapter weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """What is written, and when."""

    output: Path = Path("runs/qlora")
    """Folder of the run: adapter, checkpoints, train.jsonl, summary.json."""
    resume: bool = False
    """Go on from the newest sound checkpoint in --output; exact: the adapter is that of the uninterrupted run."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints kept."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates before and after only."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's folder too."""
    merge: Literal["no", "quantized-base", "full-base"] = "no"
    """Write a merged model as well: into the dequantized 4-bit base that was trained on, or into the original weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
