"""Bugs in what a run writes, and goes on from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants import Planted

BUGS: dict[str, Planted] = {
    "finetune/disk/state": (
        ["tests/unit/finetune/disk/test_checkpoint.py", "tests/properties/disk/test_resume_machine.py"],
        [
            ("if id(node) not in seen:", "if True:"),
            ('torch.set_rng_state(tree["torch"])', "pass"),
            ('return tuple(items) if kind == "tuple" else items', "return items"),
            ("tensor.detach().cpu().contiguous()", "tensor.detach().cpu()"),
            ('random.setstate((python["version"]', 'str((python["version"]'),
        ],
    ),
    "finetune/disk/checkpoint": (
        ["tests/unit/finetune/disk/test_checkpoint.py"],
        [
            ("for old in paths(folder)[keep:]:", "for old in paths(folder)[:keep]:"),
            ('if found["sha256"] != expected["sha256"]:', "if False:"),
            ("key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True", "reverse=False"),
            ("digest != _digest_of(files) or set(files) != {_TENSORS, _STATE}", "set(files) != {_TENSORS, _STATE}"),
            ("if version != FORMAT:", "if False:"),
        ],
    ),
    "finetune/disk/durable": (
        ["tests/unit/finetune/disk/test_checkpoint.py"],
        [
            ("os.rename(aside, path)\n            _fsync(path.parent)", "shutil.copytree(aside, path)"),
            ("remove_folder(path)\n            os.rename", "os.rename"),
            ("<= keep]", "< keep]"),
            ('if line.endswith("}\\n")', "if line"),
            ("if isinstance(error, OSError) and error.errno in _DISK_ERRORS:", "if False:"),
        ],
    ),
    "finetune/disk/resume": (
        ["tests/unit/finetune/disk/test_resume.py", "tests/unit/finetune/config/test_settings.py"],
        [
            ("- FREE", "- FREE - {'seed'}"),
            ("if before != after:", "if False:"),
            ('now["dropout"] == 0', "True"),
            ("if split_matters:", "if False:"),
            ("changed -= set(_LENGTH)", "changed -= set(_LENGTH) | {'rank'}"),
            ('return int(settings["micro_batch"]) * int(settings["accumulation"])', "return 0"),
        ],
    ),
    "finetune/training/stop": (
        ["tests/unit/finetune/training/test_stop.py", "tests/unit/finetune/config/test_settings.py"],
        [
            ("self.requested = True\n", "pass\n"),
            ("if not self._deferring:", "if self._deferring:"),
            ("signal.signal(number, handler)", "pass"),
            ("hook.remove()", "pass"),
            ("_SIGNALS = (signal.SIGINT, signal.SIGTERM)", "_SIGNALS = (signal.SIGINT,)"),
        ],
    ),
    "finetune/disk/run_log": (
        ["tests/unit/finetune/training/test_loop.py", "tests/unit/finetune/disk/test_run_log.py"],
        [
            ("speed = stats.tokens /", "speed = stats.targets /"),
            ("* (self.total_steps - step)", "* self.total_steps"),
            ("Lines(folder.eval_rows, keep=start_step)", "Lines(folder.eval_rows, keep=start_step + 1)"),
            ("divmod(round(seconds), 60)", "divmod(int(seconds), 60)"),
            ("max(1, self.total_steps // _LINES_WITHOUT_TERMINAL)", "(self.total_steps // _LINES_WITHOUT_TERMINAL)"),
            ("self._eval.sync()", "pass"),
            ("if row.loss is not None:", "if True:"),
        ],
    ),
    "finetune/disk/cache": (
        ["tests/unit/finetune/disk/test_cache.py"],
        [
            ('os.environ.get("XDG_CACHE_HOME") or ', ""),
            ('if chosen := os.environ.get("FINETUNE_CACHE"):', 'if chosen := os.environ.get("XDG_CACHE_HOME"):'),
            ('Path.home() / ".cache"', "Path.home()"),
            (') / "finetune"', ")"),
            ("return Path(chosen)", 'return Path(chosen) / "finetune"'),
        ],
    ),
    "finetune/disk/run_folder": (
        ["tests/unit/finetune/disk/test_run_folder.py"],
        [
            ('"model" if full else "adapter"', '"adapter" if full else "model"'),
            ('self.path / "train.jsonl"', 'self.path / "eval.jsonl"'),
            ("return [self.checkpoints, *results, ", "return [*results, "),
            (
                "[self.trained(full=False), self.trained(full=True), self.merged]",
                "[self.trained(full=False), self.merged]",
            ),
            ("self.summary, self.train_rows, self.eval_rows]", "self.summary, self.train_rows]"),
        ],
    ),
    "finetune/training/card": (
        ["tests/unit/finetune/training/test_result.py"],
        [
            ("whole = merged or config.adapter.full", "whole = config.adapter.full"),
            ("_HUB_NAME.fullmatch(", "_HUB_NAME.match("),
            ('("After", summary.answer_after)', '("After", summary.answer_before)'),
            ("_figure(summary.held_out_loss_after)", "_figure(summary.held_out_loss_before)"),
            ("double_quant={config.model.double_quant}", "double_quant=True"),
            ("if config.model.precision not in QUANTIZED:", "if config.model.precision in QUANTIZED:"),
            ("{yaml_file.dump(config).rstrip()}", "{config}"),
        ],
    ),
    "finetune/training/result": (
        ["tests/unit/finetune/training/test_result.py"],
        [
            ('folder.glob("*.safetensors")', 'folder.glob("*")'),
            ("reversed(evaluations) if row.step == setup.total_steps", "reversed(evaluations)"),
            ("round(tokens / seconds, 3)", "round(seconds / tokens, 3)"),
            (
                "run.trained(full=setup.config.adapter.full)",
                "run.trained(full=not setup.config.adapter.full)",
            ),
            ('settings["target_modules"].sort()', "pass"),
            ("* (after - before) / before", "* (before - after) / before"),
            ('sum(row["targets"] for row in rows)', 'sum(row["tokens"] for row in rows)'),
            ("answer_before=first.answer if first", "answer_before=last.answer if last"),
            ("with durable.folder(run.merged) as folder:", "with durable.folder(adapter) as folder:"),
        ],
    ),
    "finetune/model/gguf": (
        ["tests/unit/finetune/model/test_gguf.py"],
        [
            ("|{stat.st_size}|{stat.st_mtime_ns}", ""),
            ("if not target.is_dir():", "if True:"),
            ("fcntl.flock(lock, fcntl.LOCK_EX)", "pass"),
            ("< EXACT_BYTES", "> EXACT_BYTES"),
            (
                "with durable.folder(target) as folder:\n                _convert(file, folder)",
                "target.mkdir()\n            _convert(file, target)",
            ),
            ("or not file.is_file()", ""),
            ("tokenizer.save_pretrained(folder)", "pass"),
        ],
    ),
}
