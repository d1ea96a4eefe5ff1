"""Every setting of a run, once: frozen dataclasses, whose fields are the flags, the YAML keys and the help text.

Imports nothing heavy, so that ``--help`` and a mistyped flag answer at once. What a value may be is in ``validate.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp4", "nf4"]
ComputeDtype = Literal["auto", "fp32", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
KernelsName = Literal["auto", "liger", "torch"]
ScheduleName = Literal["constant", "linear", "cosine"]
MergeBase = Literal["none", "quantized-base", "full-base"]

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DATA = "pydoc"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    model: str = EMBEDDED_MODEL
    """Local folder, hub name, `.gguf` file, or `smollm2-135m` (embedded, needs no network)."""
    precision: Precision = "nf4"
    """How the base's linear layers are stored. Embeddings, norms and head keep the compute dtype."""
    double_quant: bool = True
    """Quantize the 4-bit blocks' scales as well (saves 0.37 bit a parameter)."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations and of what is not quantized.
    auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
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
    """Dropout on the adapter's input, 0 to below 1. The base's own, where its config.json has any, is on beside it."""
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

    data: str = EMBEDDED_DATA
    """Local .jsonl/.json/.csv/.parquet file, hub dataset name, or `pydoc`
    (embedded: the standard library's help topics)."""
    eval_data: str | None = None
    """Held-out rows, as for --data; without it --eval-fraction of --data is held out."""
    eval_fraction: float = 0.1
    """Share of the rows held out when --eval-data is not given, 0 to below 1."""
    seq: int = 512
    """Longest sequence in tokens; longer rows are cut, counted and reported."""
    packing: bool = False
    """Put several rows into one sequence, positions reset and attention kept apart; models that cannot are refused."""
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
    """Micro-batches in one optimizer step; gradients are exactly those of the whole window.
    The second and all later ones add the gradients' own bytes to the peak at most, once;
    an adapter's none under a paged optimizer."""
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
    """adamw is torch's, in the weights' own dtype; the others are bitsandbytes', and update a bf16 adapter in fp32.
    Paged state lives in managed memory on a GPU and is ordinary on a CPU.
    With it an adapter's gradients wait in host memory for the window's next micro-batch."""
    kernels: KernelsName = "auto"
    """Fused kernels on a GPU. auto: the adapter with its base layer, the optimizer as one kernel, and those of
    liger-kernel where it is installed; liger: the same, refused where it is not; torch: PyTorch's and peft's own."""
    checkpointing: bool = True
    """Recompute activations in backward (non-reentrant): one layer's activations instead of all layers'."""
    offload_activations: bool = False
    """Keep the checkpointed layers' inputs in host memory."""
    loss_chunk: int = 256
    """Tokens whose logits exist at one time in the loss."""
    seed: int = 0
    """Seed of data order, dropout and initial adapter weights."""
    threads: int = 0
    """CPU threads; 0 is what torch picks (OMP_NUM_THREADS, else all cores). A resumed run keeps its first count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """What is written, and when."""

    output: Path = Path("runs/qlora")
    """Folder of the run: adapter, checkpoints, train.jsonl, summary.json."""
    resume: bool = False
    """Go on from the newest sound checkpoint in --output; exact: the adapter is that of the uninterrupted run."""
    overwrite: bool = False
    """Remove an earlier run from --output first, instead of refusing to touch it."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints kept."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates before and after only."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's folder too."""
    merge: MergeBase = "none"
    """Write a merged model as well: quantized-base merges into the dequantized weights that were trained on,
    full-base into the original ones."""
    question: str | None = None
    """Asked before and after training, answer shown. Without it, the shortest held-out prompt is asked."""
    answer_tokens: int = 48
    """Longest answer to --question, in tokens; 0 asks nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRunConfig:
    """Look before you train: each of these prints an answer and trains nothing."""

    print_config: bool = False
    """Print the YAML that reproduces this run."""
    dry_run: bool = False
    """Run the step on a dry GPU at full size, without weights or hardware, and say whether it fits --gpu."""
    gpu: str | None = None
    """Card for --dry-run and --fit, such as rtx-4080 (`python -m pytest_vram cards` lists them)."""
    fit: bool = False
    """Search the settings that train the most tokens a step on --gpu, and print the command."""
    html: Path | None = None
    """Write a page of the dry run: memory over time by category and phase, and the lines that held the peak."""
    json: Path | None = None
    """Write the dry run's figures to this file, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    dry: DryRunConfig = field(default_factory=DryRunConfig)

    @property
    def embedded(self) -> bool:
        """Whether both the model and the data are the ones that need no file and no network."""
        return self.model.model == EMBEDDED_MODEL and self.data.data == EMBEDDED_DATA


DEMO = RunConfig(
    adapter=AdapterConfig(rank=8, alpha=16.0),
    data=DataConfig(seq=256, eval_fraction=0.04),
    train=TrainConfig(epochs=0.2, accumulation=4, learning_rate=1e-3, checkpointing=False),
    output=OutputConfig(output=Path("runs/demo"), overwrite=True, save_every=10, eval_every=20),
)
"""What takes the place of the defaults when --model and --data are the embedded ones: a few minutes on two cores."""
