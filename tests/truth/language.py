"""Cases of language models: full training, adapters, quantized bases, rows of many lengths, generation."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from marks import Marks, case, train

from finetune.model.shapes import load_shape
from pytest_vram.drygpu import empty_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QLORA = ("transformers", "peft", "bitsandbytes", "accelerate")
MEASURED_FINETUNE = "c9b7b33"


def build(shape: str = "llama-3.2-1b", *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> torch.nn.Module:
    """A causal language model of a public shape, with random weights made on the card, its config changed."""
    from transformers import AutoModelForCausalLM

    config = load_shape(shape)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def token_ids(model: torch.nn.Module, rows: int, length: int) -> torch.Tensor:
    """Random token ids on the card."""
    vocabulary = model.config.vocab_size
    return torch.randint(5, vocabulary - 5, (rows, length), generator=torch.Generator().manual_seed(0)).cuda()


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, **more).loss


@case("transformers")
def full_llama1b_adamw(marks: Marks) -> None:
    model = build()
    ids = token_ids(model, 4, 1024)
    train(marks, model, lambda _: next_token_loss(model, ids))


@case("transformers", "bitsandbytes")
def full_llama1b_adam8bit(marks: Marks) -> None:
    import bitsandbytes

    model = build()
    ids = token_ids(model, 4, 1024)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    train(marks, model, lambda _: next_token_loss(model, ids), optimizer=optimizer)


@case("transformers")
def full_llama1b_fp32_tf32_adafactor(marks: Marks) -> None:
    model = build(dtype=torch.float32, num_hidden_layers=8)
    ids = token_ids(model, 2, 1024)
    optimizer = torch.optim.Adafactor(model.parameters())
    train(marks, model, lambda _: next_token_loss(model, ids), optimizer=optimizer)


def rows_of_many_lengths(marks: Marks) -> None:
    model = build(num_hidden_layers=8)
    dice = random.Random(1)
    lengths = [dice.randrange(64, 2048) for _ in range(25)]
    batches = [token_ids(model, 4, length).cpu() for length in lengths]
    train(marks, model, lambda step: next_token_loss(model, batches[step].cuda()), steps=25)


@case("transformers")
def varlen_llama1b(marks: Marks) -> None:
    rows_of_many_lengths(marks)


@case("transformers", conf="expandable_segments:True")
def varlen_llama1b_expandable(marks: Marks) -> None:
    rows_of_many_lengths(marks)


@case("transformers", conf="garbage_collection_threshold:0.6,max_split_size_mb:128")
def varlen_llama1b_gcthresh(marks: Marks) -> None:
    rows_of_many_lengths(marks)


@case("transformers", conf="backend:cudaMallocAsync")
def varlen_llama1b_mallocasync(marks: Marks) -> None:
    rows_of_many_lengths(marks)


@case("transformers", "peft")
def lora_padded_llama1b(marks: Marks) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.05))
    dice = random.Random(2)

    def padded() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = [dice.randrange(50, 900) for _ in range(4)]
        ids, mask = (torch.zeros(4, max(lengths), dtype=torch.long) for _ in range(2))
        for row, length in enumerate(lengths):
            ids[row, :length] = 7
            mask[row, :length] = 1
        return ids, mask

    batches = [padded() for _ in range(10)]

    def loss_of(step: int) -> torch.Tensor:
        ids, mask = (tensor.cuda() for tensor in batches[step])
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    train(marks, model, loss_of, steps=10)


@case(*QLORA)
def int8_lora_llama1b(marks: Marks) -> None:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            str(empty_checkpoint(load_shape("llama-3.2-1b"), folder, dtype="bfloat16")),
            dtype=torch.bfloat16,
            device_map={"": 0},
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(r=16, target_modules="all-linear"))
    ids = token_ids(model, 4, 1024)
    model.train()
    train(marks, model, lambda _: next_token_loss(model, ids, use_cache=False))


@case(*QLORA, finetune=MEASURED_FINETUNE)
def ours_int8_llama1b(marks: Marks) -> None:
    from finetune.config.settings import AdapterConfig, ModelConfig, TrainConfig
    from finetune.data.batches import Batch
    from finetune.model.load import attach_adapter, load_base
    from finetune.training.optim import make_optimizer
    from finetune.training.step import train_step

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = empty_checkpoint(load_shape("llama-3.2-1b"), folder, dtype="bfloat16")
        base = load_base(ModelConfig(model=str(checkpoint), precision="int8"))
    config = TrainConfig(micro_batch=4, accumulation=2)
    model = attach_adapter(base, AdapterConfig(rank=16), seed=0)
    optimizer = make_optimizer(model.parameters(), config)
    marks.mark("built")
    ids = token_ids(model, 4, 1024).cpu()
    window = [Batch(input_ids=ids, labels=ids.clone())] * 2
    for step in range(3):
        train_step(model, window, optimizer, config, step=step, total_steps=3)
        marks.mark(f"step{step}")


@case("transformers")
def gpt2_fp16_scaler(marks: Marks) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("cuda"):
        model = GPT2LMHeadModel(GPT2Config())
    ids = token_ids(model, 8, 1024)
    scaler = torch.amp.GradScaler("cuda")
    train(marks, model, lambda _: next_token_loss(model, ids), scaler=scaler, autocast=torch.float16)


@case("transformers", "triton")
def gpt2_compile(marks: Marks) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("cuda"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=4))
    ids = token_ids(model, 8, 512)
    compiled = torch.compile(model)
    train(marks, model, lambda _: next_token_loss(compiled, ids), autocast=torch.bfloat16)


@case("transformers")
def generate_llama1b(marks: Marks) -> None:
    model = build().eval()
    ids = token_ids(model, 16, 512)
    marks.mark("built")
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        for number in range(2):
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            marks.mark(f"gen{number}")


@case("transformers", "peft")
def mixtral_small_lora(marks: Marks) -> None:
    from peft import LoraConfig, get_peft_model

    smaller = {"num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 7168, "head_dim": 128}
    model = build("mixtral-8x7b", **smaller, num_attention_heads=16, num_key_value_heads=4)
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    ids = token_ids(model, 2, 2048)
    train(marks, model, lambda _: next_token_loss(model, ids, output_router_logits=True))


@case("transformers")
def bert_mlm_fp32_padded(marks: Marks) -> None:
    from transformers import BertConfig, BertForMaskedLM

    with torch.device("cuda"):
        model = BertForMaskedLM(BertConfig())
    ids = token_ids(model, 16, 512)
    mask = torch.ones_like(ids)
    mask[:, 400:] = 0
    train(marks, model, lambda _: next_token_loss(model, ids, attention_mask=mask))


def qlora(marks: Marks, recipe: str, shape: str, length: int, *, micro_batch: int = 1) -> None:
    """A recipe of benchmarks/recipes.py: three steps, each of two micro-batches."""
    sys.path.insert(0, str(BENCHMARKS))
    import recipes

    load, run = recipes.RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        base = load(str(empty_checkpoint(load_shape(shape), folder, dtype="bfloat16")))
        marks.mark("loaded")
        run(base, argparse.Namespace(seq=length, micro_batch=micro_batch, accumulation=2, steps=3))
        marks.mark("end")


@case(*QLORA)
def recipe_trainer_mistral_2048(marks: Marks) -> None:
    qlora(marks, "trainer", "mistral-7b", 2048)


@case(*QLORA, finetune=MEASURED_FINETUNE)
def recipe_ours_mistral_2048(marks: Marks) -> None:
    qlora(marks, "ours", "mistral-7b", 2048)


@case(*QLORA, finetune=MEASURED_FINETUNE)
def recipe_ours_llama8b_8192(marks: Marks) -> None:
    qlora(marks, "ours", "llama-3.1-8b", 8192)


@case(*QLORA, finetune=MEASURED_FINETUNE)
def recipe_ours_mistral_512x16(marks: Marks) -> None:
    qlora(marks, "ours", "mistral-7b", 512, micro_batch=16)
