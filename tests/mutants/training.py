"""Bugs in model, step and loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mutants.anchor import Bug

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/model/load": (
        [
            "tests/properties/model/test_base_model.py",
            "tests/properties/model/test_qlora_refusals.py",
            "tests/properties/training/test_qlora_step.py",
        ],
        [
            Bug("load_base", "model.requires_grad_(False)", "pass"),
            Bug("load_base", "keep_weights_unpacked(model)", "pass"),
            Bug("attach_adapter", "torch.manual_seed(seed)", "pass"),
            Bug("attach_adapter", "config.rslora", "False"),
            Bug("_quantization", "bnb_4bit_quant_type=config.precision", "bnb_4bit_quant_type='nf4'"),
        ],
    ),
    "finetune/model/forward": (
        ["tests/properties/training/test_accumulation.py", "tests/properties/training/test_qlora_step.py"],
        [
            Bug("hidden_states", "not batch.padded_right", "batch.padded_right"),
            Bug("hidden_states", "arguments['position_ids'] = batch.position_ids", "pass"),
            Bug("_router_loss", "loss * float(base.config.router_aux_loss_coef)", "loss"),
            Bug("_router_loss", "batch.attention_mask", "None"),
            Bug("set_checkpointing", "is_checkpointing(base) == enabled", "is_checkpointing(base) != enabled"),
        ],
    ),
    "finetune/model/loss": (
        ["tests/unit/finetune/model/test_loss.py", "tests/properties/training/test_accumulation.py"],
        [
            Bug("target_positions", "labels[:, 1:]", "labels[:, :-1]"),
            Bug("_loss_and_grad", "grad[rows, targets] -= 1.0", "pass"),
            Bug("_loss_and_grad", "logits[:, rule.words:] = -torch.inf", "pass"),
            Bug("_loss_and_grad", "grad.mul_(unit * rule.scale)", "pass"),
            Bug("_ChunkedCrossEntropy.forward", "grad_weight += grad.T @ part", "grad_weight = grad.T @ part"),
            Bug("_ChunkedCrossEntropy.forward", "torch.cat(losses).sum", "torch.cat(losses).mean"),
        ],
    ),
    "finetune/training/accumulate": (
        ["tests/properties/training/test_accumulation.py", "tests/properties/training/test_accumulation_processes.py"],
        [
            Bug(
                "window_gradients",
                "1.0 if scaled else 1.0 / targets",
                "1.0 / window[0].targets if window[0].targets else 1.0",
            ),
            Bug("window_gradients", "loss_sum += loss.detach()", "loss_sum = loss.detach()"),
            Bug("window_gradients", "router * ((targets if scaled else 1.0) / shares)", "router"),
            Bug("_sum_over_processes", "dist.all_reduce(parameter.grad)", "pass"),
            Bug("_over_processes", "dist.all_reduce(total)", "pass"),
        ],
    ),
    "finetune/training/host_gradients": (
        ["tests/properties/training/test_host_gradients.py"],
        [
            Bug("put_away", "_add([_part(total, earlier[p]) for p in chunk], _taken(chunk))", "_taken(chunk)"),
            Bug("bring_back", "_add([p.grad for p in both if p.grad is not None], [parts[p] for p in both])", "pass"),
            Bug("bring_back", "parameter.grad = parts[parameter].clone()", "pass"),
            Bug("_taken", "parameter.grad = None", "pass"),
            Bug("_part", "of.storage_offset()", "0"),
            Bug(
                "wanted",
                "device.type != 'cpu' and isinstance(model, PeftModel) and config.optimizer.startswith('paged')",
                "device.type != 'cpu' and isinstance(model, PeftModel)",
            ),
            Bug(
                "wanted",
                "device.type != 'cpu' and isinstance(model, PeftModel) and config.optimizer.startswith('paged')",
                "device.type != 'cpu' and config.optimizer.startswith('paged')",
            ),
            Bug(
                "wanted",
                "device.type != 'cpu' and isinstance(model, PeftModel) and config.optimizer.startswith('paged')",
                "isinstance(model, PeftModel) and config.optimizer.startswith('paged')",
            ),
        ],
    ),
    "finetune/model/checks": (
        ["tests/properties/model/test_architectures.py", "tests/properties/training/test_accumulation.py"],
        [
            Bug("check_assumptions", "_check_logits(model)", "pass"),
            Bug("check_assumptions", "_check_causal(model)", "pass"),
            Bug("why_the_split_matters", "training=True", "training=False"),
            Bug(
                "why_the_split_matters",
                "with torch.random.fork_rng(devices=cuda), _mode(model, training=True):",
                "with _mode(model, training=True):",
            ),
            Bug("why_the_split_matters", "getattr(base.config, 'output_router_logits', False)", "False"),
            Bug(
                "why_rows_mix",
                "_differ(beside[:1], beside[1:], same) or _differ(beside[:1], alone, like_alone)",
                "_differ(beside[:1], alone, like_alone)",
            ),
            Bug(
                "why_rows_mix",
                "_differ(beside[:1], beside[1:], same) or _differ(beside[:1], alone, like_alone)",
                "_differ(beside[:1], beside[1:], same)",
            ),
            Bug("why_rows_mix", "max(_MIXED, _NOISY * _difference(apart[1:2], apart[3:]))", "1.0"),
            Bug("_mode", "model.train(was_training)", "pass"),
            Bug("_rows_by_themselves", "rows_by_themselves(model)", "contextlib.nullcontext()"),
            Bug("_differ", "tolerance", "100 * tolerance"),
        ],
    ),
    "finetune/training/masters": (
        ["tests/properties/training/test_masters.py"],
        [
            Bug("split", "bits.add_(left == 2 ** 15)", "pass"),
            Bug("split", "dropped.copy_(left)", "dropped.zero_()"),
            Bug("_update_step", "joined(weight, dropped)", "weight.float()"),
            Bug("_update_step", "split(parameter.data, weight, dropped)", "weight.copy_(parameter.data)"),
            Bug("_update_step", "gradient.float()", "-gradient.float()"),
            Bug(
                "joined",
                "weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)",
                "weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(15)",
            ),
        ],
    ),
    "finetune/patches/peft": (
        ["tests/properties/model/test_dora.py", "tests/properties/model/test_layer_targets.py"],
        [
            Bug("as_named", "setattr(conversion, name, rewrites[name])", "pass"),
            Bug("PreciseDora.forward", "quotient - 1", "quotient"),
            Bug("PreciseDora.forward", "alpha=scaling", "alpha=1.0"),
            Bug("PreciseDora._by_rows", "weight.T if self.fan_in_fan_out else weight", "weight"),
            Bug("make_precise", "stored.CB = None", "pass"),
            Bug("PreciseDora.forward", "base_result = base_result - base_layer.bias", "pass"),
            Bug("dense_weight", "layer.weight.SCB if layer.state.SCB is None else layer.state.SCB", "layer.weight.SCB"),
            Bug("make_precise", "torch.promote_types(layer.weight.dtype, torch.float32)", "torch.bfloat16"),
        ],
    ),
    "finetune/training/optim": (
        [
            "tests/properties/training/test_learning_rate.py",
            "tests/properties/training/test_one_step.py",
            "tests/properties/training/test_optimizer_formulas.py",
            "tests/properties/disk/test_resume_machine.py",
        ],
        [
            Bug("make_optimizer", "config.weight_decay", "0.0"),
            Bug("make_optimizer", "bnb.optim.PagedAdamW8bit", "bnb.optim.PagedAdamW32bit"),
            Bug("make_optimizer", "torch.optim.AdamW", "torch.optim.Adam"),
            Bug("load_optimizer_state", "fresh[key].copy_(value)", "pass"),
            Bug("set_learning_rate", "group['lr'] = rate", "pass"),
        ],
    ),
    "finetune/training/step": (
        ["tests/properties/training/test_one_step.py"],
        [
            Bug("train_step", "config.clip", "config.clip * 2"),
            Bug("clip_gradients", "clip > 0", "clip > 1"),
            Bug("evaluate", "model.train(was_training)", "pass"),
            Bug("train_step", "window", "window[:1]"),
            Bug("train_step", "optimizer_step(optimizer)", "pass"),
        ],
    ),
    "finetune/training/loop": (
        ["tests/unit/finetune/training/test_loop.py", "tests/properties/disk/test_resume_machine.py"],
        [
            Bug(
                "_Loop.__init__", "restore_random_state(setup.random_state)", "seed_everything(setup.config.train.seed)"
            ),
            Bug("_Loop._undisturbed", "restore_random_state(self.random)", "pass"),
            Bug("_Loop.run", "start_step=self.step", "start_step=0"),
            Bug("require_gradients", "if without:", "if False:"),
            Bug("_Loop._train", "math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)", "True"),
        ],
    ),
    "finetune/training/prepare": (
        ["tests/unit/finetune/training/test_prepare.py", "tests/properties/disk/test_resume_machine.py"],
        [
            Bug("_restore", "restore(model, optimizer, found.state)", "pass"),
            Bug("_require_steps_left", "done > total", "False"),
            Bug("prepare", "found.step if found else 0", "0"),
            Bug("prepare", "_own_random_state(found) if found else None", "None"),
            Bug(
                "_begin",
                "load_examples(config.data, tokenizer, seed=config.train.seed)",
                "load_examples(config.data, tokenizer, seed=config.output.save_every)",
            ),
        ],
    ),
    "finetune/model/merge": (
        ["tests/properties/training/test_qlora_step.py"],
        [
            Bug("merge", "config.output.merge == 'quantized-base'", "config.output.merge != 'quantized-base'"),
            Bug("dequantized_weights", "module._parameters.get('weight')", "getattr(module, 'weight', None)"),
            Bug("dequantized_weights", "('Params4bit', 'Int8Params')", "('Int8Params',)"),
            Bug("dequantized_weights", "getattr(module, 'quant_states', {})", "()"),
            Bug(
                "merge",
                "load_adapter(dense, adapter).merge_and_unload(safe_merge=True)",
                "load_adapter(dense, adapter).unload()",
            ),
        ],
    ),
    "finetune/launch": (
        ["tests/unit/finetune/test_launch.py"],
        [
            Bug("size", "{'RANK', 'WORLD_SIZE', 'MASTER_ADDR'}", "{'WORLD_SIZE'}"),
            Bug("local_rank", "os.environ.get('LOCAL_RANK', rank())", "rank()"),
            Bug("is_first", "rank() == 0", "local_rank() == 0"),
            Bug("said_once", "is_first()", "True"),
            Bug("who", "is_first()", "True"),
        ],
    ),
    "finetune/training/ranks": (
        ["tests/e2e/finetune/test_ranks.py"],
        [
            Bug("require_shares", "count < ranks", "count < 1"),
            Bug("share", "launch.rank()", "0"),
            Bug("any_of", "dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_control)", "pass"),
            Bug("summed", "dist.all_reduce(total, group=_control)", "pass"),
            Bug("_Watch.settled", "_is_gone(error)", "False"),
            Bug("_Watch._lost", "not runs(number, self._began)", "False"),
        ],
    ),
    "finetune/qlora": (
        ["tests/unit/finetune/test_qlora.py"],
        [
            Bug("main", "sys.argv[1:] if argv is None else argv", "argv or sys.argv[1:]"),
            Bug("main", "config.dry.dry_run or config.dry.fit", "config.dry.dry_run"),
            Bug("main", "ExitCode.INTERRUPTED", "ExitCode.OK"),
            Bug(
                "_run",
                "with lock, Stop().listening() as stop, explained(config, holdings):",
                "with lock, Stop().listening() as stop:",
            ),
            Bug(
                "_run",
                "with lock, Stop().listening() as stop, explained(config, holdings):",
                "with Stop().listening() as stop, explained(config, holdings):",
            ),
            Bug("_run", "except StopRequested:", "except KeyboardInterrupt:"),
            Bug("main", "except FinetuneError as error:", "except RunInterruptedError as error:"),
            Bug("main", "print(report(summary))", "pass"),
        ],
    ),
}
