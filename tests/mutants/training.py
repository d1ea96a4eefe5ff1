"""Bugs in model, step and loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "model": (
        [
            "tests/properties/test_base_model.py",
            "tests/properties/test_qlora_refusals.py",
            "tests/properties/test_qlora_step.py",
        ],
        [
            ("model.requires_grad_(False)", "pass"),
            ("module.support_avx512bf16_for_cpu = False", "pass"),
            ("torch.manual_seed(seed)", "pass"),
            ("use_rslora=config.rslora", "use_rslora=False"),
            ("bnb_4bit_quant_type=config.precision", 'bnb_4bit_quant_type="nf4"'),
        ],
    ),
    "forward": (
        ["tests/properties/test_accumulation.py", "tests/properties/test_qlora_step.py"],
        [
            ("and not batch.padded_right", "and batch.padded_right"),
            ('arguments["position_ids"] = batch.position_ids', "pass"),
            ("return loss * float(base.config.router_aux_loss_coef)", "return loss"),
            ("base.config.num_experts_per_tok, batch.attention_mask", "base.config.num_experts_per_tok, None"),
            (
                "if bool(base.is_activation_checkpointing) == enabled:",
                "if bool(base.is_activation_checkpointing) != enabled:",
            ),
        ],
    ),
    "loss": (
        ["tests/unit/test_finetune_loss.py", "tests/properties/test_accumulation.py"],
        [
            ("shifted = labels[:, 1:]", "shifted = labels[:, :-1]"),
            ("grad[rows, targets] -= 1.0", "pass"),
            ("grad.mul_(unit * rule.scale)", "pass"),
            ("grad_weight += grad.T @ part", "grad_weight = grad.T @ part"),
            ("return torch.stack(losses).sum()", "return torch.stack(losses).mean()"),
        ],
    ),
    "accumulate": (
        ["tests/properties/test_accumulation.py", "tests/properties/test_accumulation_processes.py"],
        [
            ("unit = 1.0 if scaled else 1.0 / targets", "unit = 1.0 / window[0].targets if window[0].targets else 1.0"),
            ("loss_sum += loss.detach()", "loss_sum = loss.detach()"),
            ("router * ((targets if scaled else 1.0) / shares)", "router"),
            ("dist.all_reduce(parameter.grad)", "pass"),
            ("dist.all_reduce(total)", "pass"),
        ],
    ),
    "hostgradients": (
        ["tests/properties/test_host_gradients.py"],
        [
            ("        _add([_part(total, earlier[p]) for p in chunk], _taken(chunk))\n", "        _taken(chunk)\n"),
            ("        _to_host(total, host)\n    for chunk", "    for chunk"),
            ("            parameter.grad = None\n", ""),
            ("        _add([p.grad for p in both if p.grad is not None], [parts[p] for p in both])\n", ""),
            ("parameter.grad = parts[parameter].clone()", "pass"),
            ("begin = of.storage_offset()", "begin = 0"),
            (' and config.optimizer.startswith("paged")', ""),
            ("isinstance(model, PeftModel) and ", ""),
            ('device.type != "cpu" and ', ""),
        ],
    ),
    "assumptions": (
        ["tests/properties/test_architectures.py", "tests/properties/test_accumulation.py"],
        [
            ("        _check_logits(model)\n", ""),
            ("_mode(model, training=True)", "_mode(model, training=False)"),
            ("torch.random.fork_rng(devices=cuda), ", ""),
            ('if getattr(base.config, "output_router_logits", False):', "if False:"),
            ("_differ(beside[0], beside[1], same) or ", ""),
            (" or _differ(beside[0], alone, like_alone)", ""),
            ("model.train(was_training)", "pass"),
            ("state.threshold = 0.0", "pass"),
            ("state.threshold = threshold", "pass"),
            ("> tolerance * float", "> 100 * tolerance * float"),
        ],
    ),
    "masters": (
        ["tests/properties/test_masters.py"],
        [
            ("bits.add_(left == 2**15)", "pass"),
            ("dropped.copy_(left)", "dropped.zero_()"),
            ("parameter.data = joined(weight, dropped)", "parameter.data = weight.float()"),
            ("split(parameter.data, weight, dropped)", "weight.copy_(parameter.data)"),
            ("parameter.grad = gradient.float()", "parameter.grad = -gradient.float()"),
            ("bitwise_left_shift_(16)\n    return", "bitwise_left_shift_(15)\n    return"),
        ],
    ),
    "adamw": (
        ["tests/properties/test_masters.py", "tests/properties/test_optimizer_formulas.py"],
        [
            ("master = master * numbers.shrink", "pass"),
            ("joined(of.weight, of.dropped)", "of.weight.float()"),
            ("split(master, of.weight, of.dropped)", "of.weight.copy_(master)"),
            ("add_(gradient * numbers.rest2 * gradient)", "add_(gradient * numbers.rest2)"),
            ("eps=eps * second", "eps=eps"),
            ("rate=-lr * second / (1.0 - betas[0] ** step)", "rate=-lr"),
        ],
    ),
    "adamw_kernel": (
        ["tests/properties/test_adamw_kernel.py"],
        [
            ("+ ((bits >> 16) & 1)) >> 16", "+ 1) >> 16"),
            ("nearest += (left == 32768).to(tl.int32)", "pass"),
            ("gradient * rest2 * gradient", "gradient * gradient * rest2"),
            ("tl.sqrt_rn(second) + eps", "tl.sqrt_rn(second + eps)"),
            ("later = tl.load(table + middle) <= block", "later = tl.load(table + middle) < block"),
            ("here = at < size", "here = at <= size"),
        ],
    ),
    "nf4_kernel": (
        ["tests/properties/test_nf4_kernel.py"],
        [
            ("scale = scale + tl.load(scale_mean)", "pass"),
            ("tl.join(first, second)", "tl.join(second, first)"),
            ("block // scales_block", "block * 0"),
            ("+ ((bits >> 16) & 1)) >> 16", "+ 1) >> 16"),
            ('state.quant_type != "nf4" or ', ""),
            ("tl.program_id(0).to(tl.int64) * rows", "tl.program_id(0).to(tl.int64)"),
        ],
    ),
    "kernels": (
        ["tests/unit/test_finetune_kernels.py"],
        [
            ('if name != "liger":', "if True:"),
            ('elif device.type != "cuda":', "elif False:"),
            (' or name == "torch"', ""),
            (" or getattr(model, _SET, False)", ""),
            ('used["swiglu"] = used["geglu"] = False', "pass"),
            ('"fused_linear_cross_entropy": False', '"fused_linear_cross_entropy": True'),
        ],
    ),
    "fusedadapter": (
        ["tests/properties/test_fused_adapter.py"],
        [
            ("y.addmm_(part, up.t(), alpha=scale)", "y.addmm_(part, up.t())"),
            ("grad_x.addmm_(of, weight)", "grad_x"),
            ("grad_x.addmm_(grad_inner, stacked)", "grad_x"),
            ("torch.addmm(grad_part, of, up, beta=0, alpha=scale, out=grad_part)", "torch.mm(of, up, out=grad_part)"),
            ("            if same:\n                return found\n", "            return found\n"),
            ("if layer.disable_adapters or ", "if "),
            ("if not isinstance(layer.lora_dropout[name], nn.Identity):", "if False:"),
        ],
    ),
    "pagedadamw": (
        ["tests/properties/test_adamw_kernel.py", "tests/properties/test_masters.py"],
        [
            ('state["step"] += 1', 'state["step"] = 1'),
            ("dropped=state.get(DROPPED)", "dropped=None"),
            ("        if masters:\n            keep_masters(self)\n", ""),
            ('[p for p in group["params"] if not _is_ours(p)]', 'group["params"]'),
            ('group["params"] = parameters', "pass"),
            ('weight_decay=group["weight_decay"]', "weight_decay=0.0"),
        ],
    ),
    "dora": (
        ["tests/properties/test_dora.py"],
        [
            ("(quotient - 1).to(", "quotient.to("),
            ("alpha=scaling)", "alpha=1.0)"),
            ("return weight.T if self.fan_in_fan_out else weight", "return weight"),
            ("stored.CB = None", "pass"),
            ("base_result = base_result - base_layer.bias", "pass"),
            ("scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB", "scales = layer.weight.SCB"),
            ("torch.promote_types(layer.weight.dtype, torch.float32)", "torch.bfloat16"),
        ],
    ),
    "optim": (
        [
            "tests/properties/test_learning_rate.py",
            "tests/properties/test_one_step.py",
            "tests/properties/test_optimizer_formulas.py",
            "tests/properties/test_resume_machine.py",
        ],
        [
            ('"weight_decay": config.weight_decay', '"weight_decay": 0.0'),
            ("bnb.optim.PagedAdamW8bit", "bnb.optim.PagedAdamW32bit"),
            ("return torch.optim.AdamW(chosen", "return torch.optim.Adam(chosen"),
            ("fresh[key].copy_(value)", "pass"),
            ('group["lr"] = rate', "pass"),
        ],
    ),
    "step": (
        ["tests/properties/test_one_step.py"],
        [
            ("norm = clip_gradients(parameters, config.clip)", "norm = clip_gradients(parameters, config.clip * 2)"),
            ("if clip > 0:", "if clip > 1:"),
            ("model.train(was_training)", "pass"),
            ("stats = window_gradients(model, window, config)", "stats = window_gradients(model, window[:1], config)"),
            ("optimizer_step(optimizer)", "pass"),
        ],
    ),
    "loop": (
        ["tests/unit/test_finetune_loop.py", "tests/properties/test_resume_machine.py"],
        [
            ("restore_random_state(setup.random_state)", "seed_everything(setup.config.train.seed)"),
            ("restore_random_state(self.random)", "pass"),
            ("start_step=self.step)", "start_step=0)"),
            ("if without:", "if False:"),
            ("math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)", "True"),
        ],
    ),
    "prepare": (
        ["tests/properties/test_resume_machine.py"],
        [
            ("parameter.copy_(weights[name])", "pass"),
            ('load_optimizer_state(optimizer, found.state["optimizer"])', "pass"),
            ("start_step=found.step if found else 0", "start_step=0"),
            ('random_state=found.state["random"] if found else None', "random_state=None"),
            ("seed=config.train.seed)\n    notice", "seed=config.output.save_every)\n    notice"),
        ],
    ),
    "merge": (
        ["tests/properties/test_qlora_step.py"],
        [
            ('if config.output.merge == "quantized-base":', 'if config.output.merge != "quantized-base":'),
            ('module._parameters.get("weight")', 'getattr(module, "weight", None)'),
            ('"Params4bit", "Int8Params"', '"Int8Params",'),
            ('getattr(module, "quant_states", {})', "()"),
            ("merge_and_unload(safe_merge=True)", "unload()"),
        ],
    ),
    "qlora": (
        ["tests/unit/test_finetune_qlora.py"],
        [
            ("sys.argv[1:] if argv is None else argv", "argv or sys.argv[1:]"),
            ("elif config.dry.dry_run or config.dry.fit:", "elif config.dry.dry_run:"),
            ("return ExitCode.INTERRUPTED", "return ExitCode.OK"),
            (", explained(config, holdings):", ":"),
            ("run_lock(config.output.output), ", ""),
            ("except StopRequested:", "except KeyboardInterrupt:"),
            (
                '{error}", file=sys.stderr)\n        return error.exit_code',
                '{error}", file=sys.stderr)\n        return ExitCode.USAGE',
            ),
            ("print(report(summary))", "pass"),
        ],
    ),
}
