"""Bugs in what a run writes, and goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "state": (
        ["tests/unit/test_finetune_checkpoint.py", "tests/properties/test_resume_machine.py"],
        [
            ("if id(node) not in seen:", "if True:"),
            ('torch.set_rng_state(tree["torch"])', "pass"),
            ('return tuple(items) if kind == "tuple" else items', "return items"),
            ("tensor.detach().cpu().contiguous()", "tensor.detach().cpu()"),
            ('random.setstate((python["version"]', 'str((python["version"]'),
        ],
    ),
    "checkpoint": (
        ["tests/unit/test_finetune_checkpoint.py"],
        [
            ("for old in paths(folder)[keep:]:", "for old in paths(folder)[:keep]:"),
            ('if found["sha256"] != expected["sha256"]:', "if False:"),
            ("key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True", "reverse=False"),
            ("digest != _digest_of(files) or set(files) != {_TENSORS, _STATE}", "set(files) != {_TENSORS, _STATE}"),
            ("if version != FORMAT:", "if False:"),
        ],
    ),
    "durable": (
        ["tests/unit/test_finetune_checkpoint.py"],
        [
            ("os.rename(aside, path)\n            _fsync(path.parent)", "shutil.copytree(aside, path)"),
            ("remove_folder(path)\n            os.rename", "os.rename"),
            ("<= keep]", "< keep]"),
            ('if line.endswith("}\\n")', "if line"),
            ("if isinstance(error, OSError) and error.errno in _DISK_ERRORS:", "if False:"),
        ],
    ),
    "resume": (
        ["tests/unit/test_finetune_resume.py", "tests/unit/test_finetune_settings.py"],
        [
            ("- FREE", "- FREE - {'seed'}"),
            ("if before != after:", "if False:"),
            ('now["dropout"] == 0', "True"),
            ("if split_matters:", "if False:"),
            ("changed -= set(_LENGTH)", "changed -= set(_LENGTH) | {'rank'}"),
            ('return int(settings["micro_batch"]) * int(settings["accumulation"])', "return 0"),
        ],
    ),
    "stop": (
        ["tests/unit/test_finetune_stop.py", "tests/unit/test_finetune_settings.py"],
        [
            ("self.requested = True\n", "pass\n"),
            ("if not self._deferring:", "if self._deferring:"),
            ("signal.signal(number, handler)", "pass"),
            ("hook.remove()", "pass"),
            ("_SIGNALS = (signal.SIGINT, signal.SIGTERM)", "_SIGNALS = (signal.SIGINT,)"),
        ],
    ),
    "runlog": (
        ["tests/unit/test_finetune_loop.py", "tests/unit/test_finetune_runlog.py"],
        [
            ("speed = stats.tokens /", "speed = stats.targets /"),
            ("* (self.total_steps - step)", "* self.total_steps"),
            ("Lines(output / EVAL_FILE, keep=start_step)", "Lines(output / EVAL_FILE, keep=start_step + 1)"),
            ("divmod(round(seconds), 60)", "divmod(int(seconds), 60)"),
            ("max(1, self.total_steps // _LINES_WITHOUT_TERMINAL)", "(self.total_steps // _LINES_WITHOUT_TERMINAL)"),
            ("self._eval.sync()", "pass"),
            ("if row.loss is not None:", "if True:"),
        ],
    ),
    "card": (
        ["tests/unit/test_finetune_result.py"],
        [
            ("whole = merged or config.adapter.full", "whole = config.adapter.full"),
            ("_HUB_NAME.fullmatch(", "_HUB_NAME.match("),
            ('("After", summary.answer_after)', '("After", summary.answer_before)'),
            ("_figure(summary.held_out_loss_after)", "_figure(summary.held_out_loss_before)"),
            ("double_quant={config.model.double_quant}", "double_quant=True"),
            ("if config.model.precision not in QUANTIZED:", "if config.model.precision in QUANTIZED:"),
            ("{configfile.dump(config).rstrip()}", "{config}"),
        ],
    ),
    "result": (
        ["tests/unit/test_finetune_result.py"],
        [
            ('folder.glob("*.safetensors")', 'folder.glob("*")'),
            ("reversed(evaluations) if row.step == setup.total_steps", "reversed(evaluations)"),
            ("round(tokens / seconds, 3)", "round(seconds / tokens, 3)"),
            (
                "FULL_MODEL if setup.config.adapter.full else ADAPTER",
                "ADAPTER if setup.config.adapter.full else FULL_MODEL",
            ),
            ('settings["target_modules"].sort()', "pass"),
            ("* (after - before) / before", "* (before - after) / before"),
            ('sum(row["targets"] for row in rows)', 'sum(row["tokens"] for row in rows)'),
            ("answer_before=first.answer if first", "answer_before=last.answer if last"),
            ("with durable.folder(output.output / MERGED) as folder:", "with durable.folder(adapter) as folder:"),
        ],
    ),
    "gguf": (
        ["tests/unit/test_finetune_gguf.py"],
        [
            ("|{stat.st_size}|{stat.st_mtime_ns}", ""),
            ("if not target.is_dir():", "if True:"),
            ("fcntl.flock(lock, fcntl.LOCK_EX)", "pass"),
            ("< EXACT_BYTES", "> EXACT_BYTES"),
            (
                "with durable.folder(target) as folder:\n                _convert(file, folder)",
                "target.mkdir()\n            _convert(file, target)",
            ),
            ('os.environ.get("XDG_CACHE_HOME") or ', ""),
            ("or not file.is_file()", ""),
            ("tokenizer.save_pretrained(folder)", "pass"),
        ],
    ),
}
