"""The bugs that ``mutation.py`` plants: for each module the tests that are to notice, and pairs of old and new text."""

from __future__ import annotations

NF4 = [f"tests/properties/test_nf4_{name}.py" for name in ("invariants", "bounds", "bitsandbytes", "cuda_rules")]
DATA = ["tests/properties/test_data_encoding.py", "tests/properties/test_data_order.py"]
STEP = ["tests/properties/test_qlora_step.py", "tests/properties/test_qlora_refusals.py"]
ACCUMULATION = ["tests/properties/test_accumulation.py"]
RESUME = ["tests/properties/test_resume_machine.py"]
CHECKPOINT = ["tests/unit/test_finetune_checkpoint.py"]
SETTINGS = "tests/unit/test_finetune_settings.py"
CLI = ["tests/unit/test_finetune_cli.py", SETTINGS]

MUTANTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "nf4": (
        NF4,
        [
            ("(codes[::2] << 4) | codes[1::2]", "(codes[1::2] << 4) | codes[::2]"),
            ("scaled[-1] = (blocks[-1] / absmax[-1]).clamp(-1, 1)", "pass"),
            ("* per_scale + quantized.offset", "* per_scale"),
            ("codes = codes.masked_fill(scaled.isnan(), 0)", "pass"),
            ('"nested_offset"] = quantized.offset.item()', '"nested_offset"] = 0.0'),
            ("absmax = row_max(blocks.abs())", "absmax = blocks.amax(dim=1)"),
        ],
    ),
    "blockwise": (
        NF4[1:],
        [
            ("* 0.5 * 65535 + 0.5)", "* 0.5 * 65535)"),
            ("(below % 2 == 1)", "(below % 2 == 0)"),
            ("codes = codes.masked_fill((absmax == 0)[:, None], 0)", "pass"),
            ("absmax.repeat_interleave(blocksize)", "absmax.repeat(blocksize)"),
            ("NESTED_BLOCKSIZE = 256", "NESTED_BLOCKSIZE = 128"),
        ],
    ),
    "codebook": (
        NF4,
        [
            ("0.07958029955625534", "0.0795804"),
            ("return (values[:-1] + values[1:]) / 2", "return values[1:]"),
            ("(10 ** (decade - 6))", "(10 ** (decade - 7))"),
            ("2.0 / 65535", "2.0 / 65536"),
            ("0.00260417, ", "0.0026041667, "),
        ],
    ),
    "rows": (
        DATA[1:],
        [
            ("enumerate(lines, start=1)", "enumerate(lines)"),
            ('odd = "" in fields or None in fields.values()', "odd = False"),
            ("line = reader.line_num + 1", "line = line + 1"),
            ("{facts.st_size}:{facts.st_mtime_ns}", ""),
            ('return f"; did you mean', 'return f"; perhaps'),
            ('number += 1\n                yield Row(source=f"{path}:row', 'yield Row(source=f"{path}:row'),
        ],
    ),
    "encode": (
        DATA[:1],
        [
            ("learned_up_to[ends] > learned_up_to[offsets[:, 0]]", "learned_up_to[offsets[:, 0] + 0] > 0"),
            ("labels[: config.seq], cut=cut", "labels[-config.seq :], cut=cut"),
            ("cut = max(0, len(ids) - config.seq)", "cut = int(len(ids) > config.seq)"),
            ("(labels[1:] != IGNORED)", "(labels != IGNORED)"),
            ("yield Part(text=whole[place:], learned=False)", "yield Part(text=whole[place:], learned=True)"),
            ('completion + (tokenizer.eos_token or "")', "completion"),
        ],
    ),
    "tokens": (
        DATA[1:],
        [
            ("tally.digest.update(coded.labels.tobytes())", "pass"),
            ("tally.truncated += coded.cut > 0", "tally.truncated += coded.cut"),
            ("        source,\n        config.seq,", "        config.seq,"),
            ("if not config.skip_bad_rows:", "if config.skip_bad_rows:"),
            ("shutil.rmtree(aside, ignore_errors=True)", "pass"),
            ("if not learned:", "if False:"),
        ],
    ),
    "packing": (
        DATA[1:],
        [
            ("if left >= length", "if left > length"),
            ("free[place] -= length", "free[place] -= length - 1"),
            ("done.append(held.pop(fullest))", "held.pop(fullest)"),
            ("default_rng([_PACKING, seed])", "default_rng()"),
            ("[0, *(len(rows) for rows in packed[:-1])]", "[0, *(len(rows) for rows in packed[1:])]"),
        ],
    ),
    "data": (
        DATA[1:],
        [
            ("labels[line, begin] = IGNORED", "pass"),
            ("positions[line, begin:] = torch.arange(width - begin)\n            begin = end", "begin = end"),
            ("order[number * size : (number + 1) * size]", "order[number * size : (number + 1) * size - 1]"),
            ("default_rng([_ORDER, config.seed, epoch])", "default_rng([_ORDER, config.seed])"),
            ("np.setdiff1d(index, held)", "index"),
            ("range(start_step, total_steps(train, config))", "range(total_steps(train, config))"),
        ],
    ),
    "loss": (
        ACCUMULATION,
        [
            ("shifted = labels[:, 1:]", "shifted = labels[:, :-1]"),
            ("grad[rows, targets] -= 1.0", "pass"),
            ("grad.mul_(unit * rule.scale)", "pass"),
            ("grad_weight += grad.T @ part", "grad_weight = grad.T @ part"),
            ("return torch.stack(losses).sum()", "return torch.stack(losses).mean()"),
        ],
    ),
    "accumulate": (
        [*ACCUMULATION, "tests/properties/test_accumulation_processes.py"],
        [
            ("unit = 1.0 if scaled else 1.0 / targets", "unit = 1.0 / window[0].targets if window[0].targets else 1.0"),
            ("loss_sum += loss.detach()", "loss_sum = loss.detach()"),
            ("router * ((targets if scaled else 1.0) / shares)", "router"),
            ("dist.all_reduce(parameter.grad)", "pass"),
            ("dist.all_reduce(total)", "pass"),
        ],
    ),
    "forward": (
        [*ACCUMULATION, *STEP[:1]],
        [
            ("and not batch.padded_right", "and batch.padded_right"),
            ('arguments["position_ids"] = batch.position_ids', "pass"),
            ("return loss * float(base.config.router_aux_loss_coef)", "return loss"),
            ('arguments["output_router_logits"] = True', "pass"),
            ("base.activation_checkpointing_enable", "base.activation_checkpointing_disable() or dict"),
        ],
    ),
    "step": (
        [*STEP[:1], *RESUME],
        [
            ("norm = clip_gradients(parameters, config.clip)", "norm = clip_gradients(parameters, config.clip * 2)"),
            ("if clip > 0:", "if clip > 1:"),
            ("model.train(was_training)", "pass"),
            ("stats = window_gradients(model, window, config)", "stats = window_gradients(model, window[:1], config)"),
            ("optimizer_step(optimizer)", "pass"),
        ],
    ),
    "optim": (
        ["tests/properties/test_learning_rate.py", "tests/properties/test_optimizer_formulas.py", *RESUME],
        [
            ('"weight_decay": config.weight_decay', '"weight_decay": 0.0'),
            ("bnb.optim.PagedAdamW8bit", "bnb.optim.PagedAdamW32bit"),
            ("return torch.optim.AdamW(chosen", "return torch.optim.Adam(chosen"),
            ("fresh[key].copy_(value)", "pass"),
            ('group["lr"] = rate', "pass"),
        ],
    ),
    "model": (
        STEP,
        [
            ("model.requires_grad_(False)", "pass"),
            ("module.support_avx512bf16_for_cpu = False", "pass"),
            ("torch.manual_seed(seed)", "pass"),
            ("use_rslora=config.rslora", "use_rslora=False"),
            ("bnb_4bit_quant_type=config.precision", 'bnb_4bit_quant_type="nf4"'),
        ],
    ),
    "experts": (
        STEP,
        [
            (".chunk(2, dim=-1)", ".chunk(2, dim=-1)[::-1]"),
            ("self.act_fn(gate) * up", "gate * up"),
            ("top_k_weights.flatten()[slots, None]", "top_k_weights.flatten()[0]"),
            ("if wrong:", "if False:"),
            ("quant_type=self.quant_type", 'quant_type="nf4"'),
        ],
    ),
    "merge": (
        STEP[:1],
        [
            ('if config.output.merge == "quantized-base":', 'if config.output.merge != "quantized-base":'),
            ('module._parameters.get("weight")', 'getattr(module, "weight", None)'),
            ('"Params4bit", "Int8Params"', '"Int8Params",'),
            ('getattr(module, "quant_states", {})', "()"),
            ("merge_and_unload(safe_merge=True)", "unload()"),
        ],
    ),
    "state": (
        [*CHECKPOINT, *RESUME],
        [
            ("if id(node) not in seen:", "if True:"),
            ('torch.set_rng_state(tree["torch"])', "pass"),
            ('return tuple(items) if kind == "tuple" else items', "return items"),
            ("tensor.detach().cpu().contiguous()", "tensor.detach().cpu()"),
            ('random.setstate((python["version"]', 'str((python["version"]'),
        ],
    ),
    "checkpoint": (
        CHECKPOINT,
        [
            ("for old in paths(folder)[keep:]:", "for old in paths(folder)[:keep]:"),
            ('if found["sha256"] != expected["sha256"]:', "if False:"),
            ("key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True", "reverse=False"),
            ("digest != _digest_of(files) or set(files) != {_TENSORS, _STATE}", "set(files) != {_TENSORS, _STATE}"),
            ("if version != FORMAT:", "if False:"),
        ],
    ),
    "durable": (
        [*CHECKPOINT, *RESUME],
        [
            ("os.rename(aside, path)\n            _fsync(path.parent)", "shutil.copytree(aside, path)"),
            ("remove_folder(path)\n            os.rename", "os.rename"),
            ("<= keep]", "< keep]"),
            ('if line.endswith("}\\n")', "if line"),
            ("if isinstance(error, OSError) and error.errno in _DISK_ERRORS:", "if False:"),
        ],
    ),
    "resume": (
        ["tests/unit/test_finetune_resume.py", SETTINGS],
        [
            ("- FREE", "- FREE - {'seed'}"),
            ("if before != after:", "if False:"),
            ('now["dropout"] == 0', "True"),
            ("changed -= set(_LENGTH)", "changed -= set(_LENGTH) | {'rank'}"),
            ('return int(settings["micro_batch"]) * int(settings["accumulation"])', "return 0"),
        ],
    ),
    "loop": (
        [*RESUME, "tests/unit/test_finetune_loop.py"],
        [
            ("restore_random_state(setup.random_state)", "seed_everything(setup.config.train.seed)"),
            ("restore_random_state(self.random)", "pass"),
            ("start_step=self.step)", "start_step=0)"),
            ("if without:", "if False:"),
            ("math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)", "True"),
        ],
    ),
    "prepare": (
        RESUME,
        [
            ("parameter.copy_(weights[name])", "pass"),
            ('load_optimizer_state(optimizer, found.state["optimizer"])', "pass"),
            ("start_step=found.step if found else 0", "start_step=0"),
            ('random_state=found.state["random"] if found else None', "random_state=None"),
            ("seed=config.train.seed)\n    notice", "seed=config.output.save_every)\n    notice"),
        ],
    ),
    "validate": (
        CLI,
        [
            ('yield from _at_least("rank", adapter.rank, 1)', 'yield from _at_least("rank", adapter.rank, 0)'),
            ("if not 0 <= value < 1:", "if not 0 <= value <= 1:"),
            ("if adapter.full and model.precision in QUANTIZED:", "if False:"),
            ("if value < lowest:", "if value <= lowest:"),
            ("if not (value > 0 and math.isfinite(value)):", "if not value > 0:"),
        ],
    ),
    "configfile": (
        CLI,
        [
            ("problems.append(unknown_setting(str(key), value))", "pass"),
            ("if key in seen:", "if False:"),
            ("return float(value)", "return value"),
            ("return Path(value)", "return value"),
            ('if section == "dry":', "if False:"),
        ],
    ),
    "cli": (
        CLI,
        [
            ("validate(config)\n    return config", "return config"),
            ("if config.embedded:", "if False:"),
            ('here = {"output": config.output.output, "resume": True}', "here = {}"),
            ("settings = configfile.load(Path(flags.pop(0)))", "flags.pop(0)"),
            ("_refuse_late_file(flags)\n", "pass\n"),
        ],
    ),
    "stop": (
        ["tests/unit/test_finetune_stop.py", SETTINGS],
        [
            ("self.requested = True\n", "pass\n"),
            ("if not self._deferring:", "if self._deferring:"),
            ("signal.signal(number, handler)", "pass"),
            ("hook.remove()", "pass"),
            ("_SIGNALS = (signal.SIGINT, signal.SIGTERM)", "_SIGNALS = (signal.SIGINT,)"),
        ],
    ),
    "estimate": (
        ["tests/unit/test_finetune_estimate.py"],
        [
            ('full = weights["fp32"] + 4 * gb + 2 * 4 * gb', 'full = weights["fp32"] + 4 * gb + 4 * gb'),
            ("NESTED_BLOCK = 256", "NESTED_BLOCK = 64"),
            (
                "[config.adapter.rank * part.inputs, part.outputs * config.adapter.rank]",
                "[config.adapter.rank * part.inputs]",
            ),
            ("PAGED_FROM = 4096", "PAGED_FROM = 100_000"),
            ("return dims.layers * kept, dequantized + one_gradient", "return kept, dequantized + one_gradient"),
        ],
    ),
}
