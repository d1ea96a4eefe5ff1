"""Every setting of a run, as fields of frozen dataclasses.

A field's name is its flag and its YAML key, and its docstring is its text in ``--help``. This module imports nothing
heavy, so that ``--help`` answers at once. ``validate.py`` checks the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp4", "nf4"]
ComputeDtype = Literal["auto", "fp32", "fp16", "bf16"]
OptimizerName = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
KernelsName = Literal["auto", "liger", "torch"]
Checkpointing = Literal["auto", "all", "none"] | int
OnHost = Literal["auto"] | bool
KERNEL_CHUNKS = 2
"""So many times --loss-chunk tokens go through the loss at a time where a kernel computes it, of logits in 16 bits."""
ScheduleName = Literal["constant", "linear", "cosine"]
MergeBase = Literal["none", "quantized-base", "full-base"]

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_DATA = "docstrings"
QUANTIZED = ("int8", "fp4", "nf4")
"""The precisions that bitsandbytes implements; the others are dtypes of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The frozen base model."""

    model: str = EMBEDDED_MODEL
    """Local folder, hub name, `.gguf` file, or `smollm2-135m` (embedded, needs no network).
    A folder may also hold a model that bitsandbytes has quantized already, which is loaded as it is,
    or an adapter, which is trained further on the base model that it names."""
    precision: Precision = "nf4"
    """How the base model's linear layers are stored. Embeddings, norms and head keep the compute dtype."""
    double_quant: bool = True
    """With 4 bits: quantize the scales of the weights as well (saves 0.37 bit per parameter)."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the activations and of the weights that are not quantized.
    auto: --precision if that is a dtype, else bf16 on a GPU that supports it, fp16 on an older one, fp32 on a CPU."""
    resize_embeddings: bool = False
    """Add embedding rows for tokens that the tokenizer has and the model lacks. The new rows are trained and saved with
    the adapter: for each token one row of the model's hidden size, and a second one where the head has its own
    weights."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation, under the name that transformers gives it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one, else the CPU."""
    shard: bool = False
    """Under torchrun: spread the layers of the base over the ranks, so that each card holds a part of them. A layer is
    gathered while it runs. Needs --precision nf4 or fp4, or --full, with which gradients and optimizer states are
    spread as well."""
    offload_base: bool = False
    """With --shard over a quantized base: each rank keeps its part in pinned host memory, and copies a layer's part to
    its card while that layer is gathered. The result is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The LoRA adapter (https://arxiv.org/abs/2106.09685)."""

    full: bool = False
    """Train every weight instead of an adapter (needs an unquantized precision)."""
    rank: int = 16
    """Rank r of the adapter: the update of a weight is B A, with B [outputs, r] and A [r, inputs]."""
    alpha: float = 32.0
    """Scale of the adapter: the update is multiplied by alpha / rank (alpha / sqrt(rank) with --rslora)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter, by name or part of a path (`q_proj`, `mlp`, `layers.0`), or by a regular expression
    that matches the whole path. `all-linear` means every linear layer of the language model except the head and
    routers. At its start a run lists the layers that got an adapter, and says why the others got none."""
    exclude: tuple[str, ...] = ()
    """Layers that get no adapter, named as in --targets."""
    dropout: float = 0.0
    """Probability of dropout on the adapter's input, 0 to below 1. Dropout that the base model's config.json asks for
    stays on as well."""
    rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How the weights of A start. B starts at zero, except with orthogonal."""
    adapter_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the adapter's weights and their gradients. auto: bf16 where the base computes in bf16, else fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The rows to train on, and how they become tokens."""

    data: str = EMBEDDED_DATA
    """Local .jsonl/.json/.csv/.tsv/.parquet file, hub dataset name, or `docstrings` (embedded: the functions of
    Python's standard library, each with the first paragraph of its docstring)."""
    eval_data: str | None = None
    """Rows for evaluation only, given like --data. Without it, --eval-fraction of --data is held out."""
    eval_fraction: float = 0.1
    """Share of the rows of --data that is held out when --eval-data is not given, 0 to below 1."""
    seq: int = 512
    """Longest sequence in tokens. Longer rows are cut, and the run reports how many."""
    packing: bool = False
    """Put several rows into one sequence. No row attends to another, and the positions of each start at 0. The memory
    grows in proportion to the tokens; for the few models that need a mask it grows with their square, and the run says
    so. A model that cannot keep rows apart is refused."""
    skip_bad_rows: bool = False
    """Skip rows that cannot be used, and report them. Without it, the first such row stops the run before training."""
    train_on_prompt: bool = False
    """Take the loss on the tokens of the prompt as well as on those of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The training steps."""

    max_steps: int | None = None
    """Number of optimizer steps. If it is given, --epochs is ignored."""
    epochs: float = 1.0
    """Passes over the training rows; may be a fraction."""
    batch: int | None = None
    """Rows in one optimizer step. --accumulation follows from it."""
    micro_batch: int = 1
    """Rows in one forward and backward pass. With `auto`, or without this flag, the run chooses: see --split."""
    split: Literal["auto", "given"] = "auto"
    """Who chooses the micro-batches of a step. auto: on a GPU the run chooses those that it estimates to be the fastest
    among all that fit the card. The rows of a step stay as many as the settings say, and all ranks choose the same.
    given: the settings decide, as with --micro-batch N."""
    accumulation: int = 16
    """Micro-batches in one optimizer step. The gradient is exactly that of all their rows in one batch.
    Any value above 1 raises the peak by at most one copy of the gradients;
    with an adapter and a paged optimizer it does not raise it."""
    learning_rate: float = 2e-4
    """Learning rate at the end of warm-up, the highest of the run."""
    schedule: ScheduleName = "cosine"
    """How the learning rate changes after warm-up: it stays constant, or falls to 0."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip: float = 1.0
    """Largest norm of all gradients together; before each step, larger ones are scaled down to it. 0 turns this off."""
    optimizer: OptimizerName = "paged-adamw"
    """adamw is PyTorch's and computes in the dtype of the trained weights; the others need bitsandbytes, and update a
    bf16 adapter in fp32. On a GPU, paged-adamw updates all parameters in one kernel of this program's own, and the
    8-bit kinds update as bitsandbytes does. There the state of a paged optimizer lives in managed memory, which moves
    to the host when the card is full; on a CPU it is ordinary memory.
    With a paged optimizer the gradients of an adapter wait in host memory between the micro-batches of a step, unless
    the card has room for them."""
    kernels: KernelsName = "auto"
    """Fused kernels on a GPU. auto: adapters are fused with their base layers, paged-adamw is one kernel, and
    liger-kernel runs norms, rotations and gates if it is installed; liger: the same, refused if it is not installed;
    torch: the layers of PyTorch and peft. Without a C compiler and Python's headers, which Triton needs, auto runs the
    adapters fused and the rest as torch does."""
    checkpointing: Checkpointing = "auto"
    """Layers that compute their activations again in the backward pass, and keep their input only. all: every layer, so
    that only one layer's activations are held at a time; none: every layer keeps its activations; N: the first N layers
    recompute, and the others keep theirs. auto: on a GPU the run lets as many layers keep their activations as there is
    room for; on a CPU all recompute. The result is the same. --checkpointing alone means all, and --no-checkpointing
    none."""
    offload_activations: OnHost = "auto"
    """Whether the inputs of the layers that recompute wait in pinned host memory; at most two of them are on the card
    at a time. The copies run beside the computation. auto: on a GPU they wait there, unless that is estimated to cost
    time and the card has room for them; on a CPU and over a sharded base they stay where they are. The result is the
    same. --offload-activations alone means true, and --no-offload-activations false."""
    loss_chunk: int = 256
    """Tokens whose logits the loss computes at a time. On a GPU, where a kernel computes the loss of logits in 16 bits
    (--kernels), twice as many: they take two thirds of the memory there."""
    seed: int = 0
    """Seed of the data order, of dropout and of the adapter's initial weights."""
    threads: int = 0
    """CPU threads. 0 leaves the choice to torch (OMP_NUM_THREADS, else all cores). A resumed run keeps the number that
    it began with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """The files that a run writes, and when it writes them."""

    output: Path = Path("runs/qlora")
    """Folder of the run: adapter, checkpoints, train.jsonl, summary.json."""
    resume: bool = False
    """Continue from the newest sound checkpoint in --output. The resulting adapter equals that of a run without the
    interruption, bit for bit."""
    overwrite: bool = False
    """Remove an earlier run from --output first. Without it, a folder that holds a run is refused."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves one checkpoint, at the end."""
    keep: int = 2
    """Number of checkpoints that are kept, the newest ones."""
    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's folder as well."""
    merge: MergeBase = "none"
    """Write a model with the adapter merged into its weights as well. quantized-base merges into the dequantized
    weights, which are those that the adapter was trained on; full-base merges into the original weights."""
    question: str | None = None
    """Question that the model answers before and after training. Without it, the shortest held-out prompt is asked."""
    answer_tokens: int = 48
    """Longest answer to --question, in tokens; 0 asks no question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRunConfig:
    """Answers before training: with any of --print-config, --dry-run and --fit, nothing is trained."""

    print_config: bool = False
    """Print the YAML that reproduces this run."""
    dry_run: bool = False
    """Run the training step at full size on a dry GPU, without weights or hardware, and say whether it fits --gpu."""
    gpu: str | None = None
    """Card for --dry-run and --fit, such as rtx-4080 (`python -m pytest_vram cards` lists them)."""
    count: int | None = None
    """Cards of the dry run, one for each rank, as `torchrun --nproc-per-node COUNT` would use them (needs no torchrun).
    Without it: one, or under torchrun one for each of its ranks."""
    fit: bool = False
    """Search for the settings that are estimated to train the most tokens a second on --gpu, and print the command that
    uses them. It changes the micro-batch, the recomputed layers and, if nothing fits, rank and sequence, as far as they
    were left at their defaults. The rows of a step stay."""
    html: Path | None = None
    """Write an HTML page about the dry run: memory over time by category and phase, and the lines of code that held the
    most at the peak."""
    json: Path | None = None
    """Write the figures of the dry run to this file, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    dry: DryRunConfig = field(default_factory=DryRunConfig)

    @property
    def embedded(self) -> bool:
        """Whether the run uses the embedded model and the embedded data, as the demo does."""
        return self.model.model == EMBEDDED_MODEL and self.data.data == EMBEDDED_DATA


DEMO_QUESTION = """\
Write a one-sentence docstring for this Python function:

def celsius(fahrenheit):
    return (fahrenheit - 32) * 5 / 9"""
"""What the demo asks the model. No row of the embedded data names Celsius, which a test checks."""

DEMO = RunConfig(
    adapter=AdapterConfig(rank=8, alpha=16.0),
    data=DataConfig(seq=256, eval_fraction=0.01),
    train=TrainConfig(
        max_steps=16, micro_batch=2, accumulation=4, learning_rate=1e-3, warmup_steps=3, checkpointing="none"
    ),
    output=OutputConfig(output=Path("runs/demo"), overwrite=True, save_every=8, eval_every=8, question=DEMO_QUESTION),
)
"""The settings that replace the defaults when --model and --data are the embedded ones: a few minutes on two cores."""
