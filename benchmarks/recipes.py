"""One QLoRA training run of one recipe, to be run under ``python -m pytest_vram run``; see peak_memory.py.

Every recipe trains the same adapter (rank 16 on every linear layer of an NF4 + double-quantized base, paged 32-bit
AdamW, bf16 compute, gradient checkpointing) on rows of the same length, and differs in nothing but the code that does
it. It prints its peaks in bytes, as ``peaks ALLOCATED RESERVED``, and with ``--most`` the largest micro-batch for so
many bytes, as ``rows N``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Callable

RANK = 16
CHECKPOINTING = {"use_reentrant": False}


def rows(vocabulary: int, seq: int, count: int) -> list[dict[str, list[int]]]:
    ids = [i % (vocabulary - 10) + 5 for i in range(seq)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * seq} for _ in range(count)]


def quantized(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def lora() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(arguments: argparse.Namespace, folder: str) -> dict[str, object]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.accumulation,
        "max_steps": arguments.steps,
        "optim": "paged_adamw_32bit",
        "bf16": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def logged(trainer: Trainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(row["loss"], float(row["grad_norm"])) for row in trainer.state.log_history if "loss" in row]


def trainer(base: torch.nn.Module, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """The recipe of https://github.com/artidoro/qlora: prepare_model_for_kbit_training, peft, transformers' Trainer."""
    model = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=CHECKPOINTING)
    model = get_peft_model(model, lora())
    data = rows(
        model.config.vocab_size, arguments.seq, arguments.micro_batch * arguments.accumulation * arguments.steps
    )
    with tempfile.TemporaryDirectory() as folder:
        made = Trainer(model=model, args=TrainingArguments(**settings(arguments, folder)), train_dataset=data)
        made.train()
    return logged(made)


def trl(base: torch.nn.Module, arguments: argparse.Namespace, *, liger: bool = False) -> list[tuple[float, float]]:
    """TRL's SFTTrainer, which makes the adapter itself; with liger-kernel on request."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 100)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), pad_token="<pad>", eos_token="<eos>"
    )
    data = rows(base.config.vocab_size, arguments.seq, arguments.micro_batch * arguments.accumulation * arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        more = {"use_liger_kernel": True} if liger else {}
        made = SFTTrainer(
            model=base,
            args=SFTConfig(**settings(arguments, folder), max_length=arguments.seq, packing=False, **more),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        made.train()
    return logged(made)


def unsloth_loaded(path: str) -> torch.nn.Module:
    """The base, as Unsloth loads it; it has to be imported before transformers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from unsloth import FastLanguageModel

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 30000)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<unk>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    model, loaded = FastLanguageModel.from_pretrained(
        path, max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model.unsloth_tokenizer = loaded
    return model


def unsloth(base: torch.nn.Module, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Unsloth's adapter and checkpoints under SFTTrainer, as its notebooks have it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tokenizer = base.unsloth_tokenizer
    model = FastLanguageModel.get_peft_model(
        base,
        r=RANK,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        target_modules=names,
    )
    count = arguments.micro_batch * arguments.accumulation * arguments.steps
    data = rows(model.config.vocab_size, arguments.seq, count)
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(arguments, folder)
        del chosen["gradient_checkpointing"], chosen["gradient_checkpointing_kwargs"]
        kept = {"skip_prepare_dataset": True}
        made = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(data),
            args=SFTConfig(**chosen, max_length=arguments.seq, packing=False, dataset_kwargs=kept),
        )
        made.train()
    return logged(made)


def ours(
    base: torch.nn.Module,
    arguments: argparse.Namespace,
    *,
    on_card: bool = False,
    choose: bool = False,
    split: bool = False,
) -> list[tuple[float, float]]:
    """finetune's own step with its defaults, on a card that is so small that every layer recomputes.

    With ``on_card`` the layers' inputs stay on the card; with ``choose`` as many layers keep their activations as there
    is room for; with ``split`` too, the rows of a step are split anew, into as few micro-batches as there is room for.
    """
    model, optimizer, config = adapted(base, arguments, on_card=on_card)
    from finetune.training.step import train_step

    if choose:
        config = chosen(model, config, arguments, split=split)
        split_as = {"micro_batch": config.micro_batch, "accumulation": config.accumulation}
        arguments = argparse.Namespace(**vars(arguments) | split_as)
    window = batches(arguments, int(model.config.vocab_size))
    steps = range(arguments.steps)
    done = [train_step(model, window, optimizer, config, step=step, total_steps=arguments.steps) for step in steps]
    return [(stats.loss, stats.grad_norm) for stats in done]


def chosen(model: torch.nn.Module, train: Any, arguments: argparse.Namespace, *, split: bool) -> Any:
    """The settings with the number of layers that a run would let recompute on this card, and its split on request."""
    from finetune.config.settings import RunConfig
    from finetune.dryrun.full_rows import FullRows
    from finetune.training.split import chosen_split, keep_gradients

    count = arguments.micro_batch * arguments.accumulation
    rows = FullRows(count=count, tokens=arguments.seq, vocabulary=int(model.config.vocab_size))
    opened = dataclasses.replace(train, split="auto" if split else "given", checkpointing="auto")
    found = chosen_split(model, rows, RunConfig(train=opened))
    print(found.note, keep_gradients(model, rows, found), sep="\n", file=sys.stderr)
    return found.config.train


def floor(base: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """What no recipe of this kind can do without: printed, in bytes, as ``floor N``.

    Weights, adapters, their gradients and optimizer state, the saved inputs of all layers in bf16, and the working
    set of one layer's forward and backward, measured by running one.
    """
    model, optimizer, config = adapted(base, arguments)
    from finetune.training.step import train_step
    from pytest_vram import torch_private

    train_step(model, batches(arguments, int(model.config.vocab_size))[:1], optimizer, config, step=0, total_steps=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    layers = layers_bytes(model, arguments)  # taken while cuBLAS has its workspace, which therefore does not count
    torch_private.clear_blas_workspaces()
    print("floor", torch.cuda.memory_allocated() + layers)


def layers_bytes(model: torch.nn.Module, arguments: argparse.Namespace) -> int:
    """Bytes of the saved inputs of all layers, and of the working set of one layer."""
    from finetune.model.forward import base_model

    decoder = base_model(model).get_decoder()
    shape = (arguments.micro_batch, arguments.seq, model.config.hidden_size)
    saved: int = len(decoder.layers) * shape[0] * shape[1] * shape[2] * 2
    hidden = torch.zeros(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(arguments.seq, device="cuda")[None]
    layer = decoder.layers[0]
    layer.gradient_checkpointing = False
    embeddings = decoder.rotary_emb(hidden, positions)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = layer(hidden, position_embeddings=embeddings, attention_mask=None, position_ids=positions)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.zeros_like(out))
    # Between layers the output is the next one's saved input.
    return saved + torch.cuda.max_memory_allocated() - before - int(out.nbytes)


def adapted(
    base: torch.nn.Module, arguments: argparse.Namespace, *, on_card: bool = False
) -> tuple[torch.nn.Module, torch.optim.Optimizer, object]:
    from finetune.config.settings import AdapterConfig, TrainConfig
    from finetune.model.load import attach_adapter
    from finetune.training.optim import make_optimizer

    config = TrainConfig(
        micro_batch=arguments.micro_batch,
        accumulation=arguments.accumulation,
        optimizer="paged-adamw",
        checkpointing="all",
        offload_activations=False if on_card else "auto",
    )
    model = attach_adapter(base, AdapterConfig(rank=RANK), seed=0)
    return model, make_optimizer(model.parameters(), config), config


def loaded(path: str) -> torch.nn.Module:
    """The base, as finetune loads it."""
    from finetune.config.settings import ModelConfig
    from finetune.model.load import load_base

    return load_base(ModelConfig(model=path, precision="nf4", double_quant=True))


def batches(arguments: argparse.Namespace, vocabulary: int) -> list[object]:
    from finetune.data.batches import Batch

    ids = torch.tensor([row["input_ids"] for row in rows(vocabulary, arguments.seq, arguments.micro_batch)])
    return [Batch(input_ids=ids, labels=ids.clone()) for _ in range(arguments.accumulation)]


RECIPES = {
    "trainer": (quantized, trainer),
    "trl": (quantized, trl),
    "trl-liger": (quantized, functools.partial(trl, liger=True)),
    "unsloth": (unsloth_loaded, unsloth),
    "ours": (loaded, ours),
    "ours-on-card": (loaded, functools.partial(ours, on_card=True)),
    "ours-auto": (loaded, functools.partial(ours, choose=True)),
    "ours-batch": (loaded, functools.partial(ours, choose=True, split=True)),
    "floor": (loaded, floor),
}


def without_adapter(base: torch.nn.Module) -> None:
    """Give the base its own linear layers again, where a recipe put the adapter's around them."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def most_rows(peak_of: Callable[[int], int | None], limit: int) -> int:
    """The largest micro-batch that fits, by a line through the two largest that did; the next one does not.

    Args:
        peak_of: bytes reserved with so many rows; ``None`` where they ran out of memory.
        limit: bytes there are.
    """
    peaks: dict[int, int] = {}
    refused = 1 << 20
    guess = 1
    while True:
        peak = peak_of(guess)
        if peak is None:
            refused = guess
        else:
            peaks[guess] = peak
        fits = sorted(peaks)
        low = fits[-1] if fits else 0
        if refused - low == 1:
            return low
        if len(fits) < 2:
            guess = low + 1
        else:
            a, b = fits[-2:]
            slope = max(1.0, (peaks[b] - peaks[a]) / (b - a))
            guess = min(b + int((limit - peaks[b]) / slope), 4 * b)  # the first line may be flat
        guess = min(max(guess, low + 1), refused - 1)


def search(base: torch.nn.Module, recipe: Callable[..., object], arguments: argparse.Namespace) -> int:
    """The largest micro-batch of ``recipe`` that ``--most`` bytes take, of which the allocator hands out no more."""
    total = torch.cuda.get_device_properties(0).total_memory

    def peak_of(count: int) -> int | None:
        for parameter in base.parameters():
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            recipe(base, argparse.Namespace(**{**vars(arguments), "micro_batch": count}))
            found = int(torch.cuda.max_memory_reserved())
        except torch.OutOfMemoryError:
            found = None
        without_adapter(base)
        return found

    torch.cuda.set_per_process_memory_fraction(arguments.most / total)
    return most_rows(peak_of, arguments.most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("checkpoint")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--most", type=int, metavar="BYTES", help="then search the largest micro-batch for so many")
    arguments = parser.parse_args()
    load, recipe = RECIPES[arguments.recipe]
    base = load(arguments.checkpoint)
    recipe(base, arguments)
    print("peaks", torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    if arguments.most:
        without_adapter(base)
        print("rows", search(base, recipe, arguments))


if __name__ == "__main__":
    main()
